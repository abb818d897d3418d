"""Clients of a chat, over raw sockets: when the first token came, and whether every token came, in order.

Two dialects: our gateway's /chat, and Ollama's /api/chat, which also passes through a plain proxy.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

Dialect = Literal["gateway", "ollama"]


class Seen(NamedTuple):
    """first_s: from the request's last byte to the first token. in_order: the texts are "0 ", "1 ", ... (bench.fake_ollama)."""

    first_s: float
    last_s: float
    tokens: int
    in_order: bool
    ended: bool


class Client:
    """One connection, kept alive."""

    def __init__(self, url: str, dialect: Dialect, model: str = "") -> None:
        self._at, self._dialect, self._model = urlsplit(url), dialect, model
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, prompt: str, tokens: int) -> Seen:
        """One answer of `tokens` tokens at most, greedy."""
        reader, writer = self._streams = self._streams or await asyncio.open_connection(self._at.hostname, self._at.port)
        writer.write(self._request(prompt, tokens))
        start = time.perf_counter()
        first, count, in_order, ended = 0.0, 0, True, False
        async for text, last in self._texts(reader):
            if text:
                first = first or time.perf_counter() - start
                in_order = in_order and text == f"{count} "
                count += 1
            ended = ended or last
        return Seen(first, time.perf_counter() - start, count, in_order, ended)

    async def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            await self._streams[1].wait_closed()

    def _request(self, prompt: str, tokens: int) -> bytes:
        turns = [{"role": "user", "content": prompt}]
        body: dict[str, Any] = {"messages": turns, "stream": True}
        path = "/chat"
        if self._dialect == "gateway":
            body |= {"max_tokens": tokens, "temperature": 0}
        else:
            path = "/api/chat"
            # as the gateway asks: llama-server is started anew when `shift` changes
            same = {"truncate": False, "shift": False, "keep_alive": -1}
            body |= {"model": self._model, "options": {"num_predict": tokens, "temperature": 0}, **same}
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._at.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    async def _texts(self, reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, bool]]:
        """Each token's text, and whether the answer has ended."""
        async for line in _lines(reader):
            if self._dialect == "gateway":
                if line == b"data: [DONE]":
                    yield "", True
                elif line.startswith(b"data: "):
                    tree = json.loads(line[6:])
                    if "error" in tree:
                        raise RuntimeError(tree["error"]["message"])
                    yield tree["delta"].get("content", ""), False
            elif line:
                tree = json.loads(line)
                yield tree["message"]["content"], tree["done"]


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of a chunked reply, read to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0] or b"chunked" not in head.lower():
        raise RuntimeError(f"no stream: {head.decode('latin-1')} {(await reader.read(500)).decode('utf-8', 'replace')}")
    rest = b""
    while size := int(await reader.readline(), 16):
        *whole, rest = (rest + await reader.readexactly(size)).split(b"\n")
        await reader.readline()
        for line in whole:
            yield line
    await reader.readline()
