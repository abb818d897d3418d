"""An Ollama that computes nothing: its API with tokens on a clock, to measure what stands before it. A process of its own.

    python -m bench.fake_ollama --gap-s 0.1     # prints its port

A chat answers num_predict tokens, "0 ", "1 ", ...: the n-th at first_s + n * gap_s after the request, each in a chunk of its own.
Prompts count PROMPT_TOKENS tokens and are rendered as Gemma's are, so that a release's probes are met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from typing import Any

from server.chat import Message
from server.conversation import render
from server.port import allow_connections

PROMPT_TOKENS = 2
"""As the probes of tests.server.scripted.small_release have."""
MAX_CLIENTS = 4096
DIGEST = "sha256:" + "0" * 64


class Fake:
    def __init__(self, first_s: float, gap_s: float) -> None:
        self._first_s, self._gap_s = first_s, gap_s
        self._models: set[str] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept alive."""
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                method, path, _ = head.split(" ", 2)
                body = await _body(reader, head)
                if path == "/api/chat" and (asked := json.loads(body)).get("stream"):
                    await self._stream(asked, writer)
                else:
                    writer.write(_reply(self._answer(path, json.loads(body) if method == "POST" and body[:1] == b"{" else {}), method))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is gone, as clients go
        finally:
            writer.close()

    def _answer(self, path: str, asked: Mapping[str, Any]) -> Any:
        if path == "/api/chat":
            messages = [Message(turn["role"], turn["content"]) for turn in asked["messages"]]
            return {"_debug_info": {"rendered_template": render(messages)}}
        if path == "/api/create":
            self._models.add(asked["model"])
        if path == "/api/copy":
            self._models.add(asked["destination"])
        listed = [{"model": name, "name": name, "digest": DIGEST, "size": 1} for name in sorted(self._models)]
        return {"version": "0.99.0", "models": listed, "status": "success", "done": True}

    async def _stream(self, asked: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop()
        start, tokens = clock.time() + self._first_s, int(asked["options"]["num_predict"])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(tokens):
            wait = start + number * self._gap_s - clock.time()
            if wait > 0:
                await asyncio.sleep(wait)
            writer.write(_chunk(_line(asked["model"], f"{number} ", done=False)))
            await writer.drain()
        writer.write(_chunk(_line(asked["model"], "", done=True, tokens=tokens)) + b"0\r\n\r\n")


def _line(model: str, text: str, *, done: bool, tokens: int = 0) -> bytes:
    tree: dict[str, Any] = {"model": model, "message": {"role": "assistant", "content": text}, "done": done}
    if done:
        tree |= {"done_reason": "stop", "prompt_eval_count": PROMPT_TOKENS, "eval_count": tokens}
    return json.dumps(tree).encode() + b"\n"


def _chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def _reply(tree: Any, method: str) -> bytes:
    content = json.dumps(tree).encode() + b"\n"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    return head if method == "HEAD" else head + content


async def _body(reader: asyncio.StreamReader, head: str) -> bytes:
    headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    if "chunked" in headers.get("transfer-encoding", ""):
        parts = b""
        while size := int(await reader.readline(), 16):
            parts += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return parts
    return await reader.readexactly(int(headers.get("content-length", 0)))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-s", type=float, default=0.0)
    parser.add_argument("--gap-s", type=float, default=0.0)
    options = parser.parse_args()
    allow_connections(MAX_CLIENTS)
    fake = Fake(options.first_s, options.gap_s)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
