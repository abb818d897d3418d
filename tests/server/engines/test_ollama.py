"""What goes wrong between the gateway and an Ollama, and no real one does on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server import conversation
from server.chat import Delta, Finish, Message, Wishes
from server.engines.ollama import OllamaEngine
from server.errors import EngineError, SetupError
from server.manifest import read
from tests.server.scripted import small_release

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def speaking(replies: Mapping[str, object]) -> AsyncIterator[OllamaEngine]:
    """An engine before a server that answers a path with JSON or with bytes as they are, hangs up on None, and says nothing to a path that it does not know."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        if path not in replies:
            await closing.wait()
        elif replies[path] is not None:
            reply = replies[path]
            body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(b"" if path.startswith("/api/blobs") else body)
            await writer.drain()
        writer.close()

    closing = asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    engine = OllamaEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", slots=1)
    try:
        yield engine
    finally:
        closing.set()
        await engine.close()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("path", ["/api/create", "/api/tags"])
async def test_an_ollama_that_hangs_up_on_an_admin_call_is_an_engine_error(tmp_path: Path, path: str) -> None:
    release = read(small_release(tmp_path))
    first = release.probes[0]
    replies = {
        f"/api/blobs/sha256:{release.sha256}": "",
        "/api/create": {"status": "success"},
        "/api/chat": {
            "_debug_info": {"rendered_template": first.prompt},
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": len(first.prompt_ids),
        },
        "/api/copy": {},
        "/api/tags": {"models": []},
    }
    single = type(release)(release.directory, release.manifest, (first,))
    async with speaking(replies | {path: None}) as engine:
        with pytest.raises(EngineError, match="did not take"):
            await engine.load(single)


@pytest.mark.parametrize(
    "replies", [{}, {"/api/version": {"version": "0.34.4"}}, {"/api/version": {"version": "0.34.4"}, "/api/tags": None}]
)
async def test_an_ollama_that_says_nothing_is_not_ready_within_seconds(replies: Mapping[str, object]) -> None:
    async with speaking(replies) as engine, asyncio.timeout(8):
        status = await engine.status("trinity:x")
    assert not status.ready and "does not answer" in status.detail


async def test_an_ollama_that_does_not_show_its_prompt_is_an_engine_error() -> None:
    async with speaking({"/api/chat": {"message": {"role": "assistant", "content": "Hi"}, "done": True}}) as engine:
        with pytest.raises(EngineError, match="does not show the prompt"):
            await engine.render("trinity:x", [Message("user", "Hi")])


HTML = b"<html><title>Log in</title></html>"


async def test_a_proxy_s_page_in_place_of_ollama_s_words_is_an_engine_error_everywhere(tmp_path: Path) -> None:
    release = read(small_release(tmp_path))
    paths = ("version", "tags", "ps", "chat", "create", "copy", "generate", "delete")
    async with speaking({f"/api/{name}": HTML for name in paths} | {f"/api/blobs/sha256:{release.sha256}": HTML}) as engine:
        for call in (
            engine.render(release.model, [Message("user", "Hi")]),
            engine.load(release),
            engine.place(release),
            engine.held_bytes(),
            engine.prune("trinity", ()),
            engine.unload(release.model),
        ):
            with pytest.raises(EngineError, match=r"did not|says something else"):
                await call
        assert not (await engine.status(release.model)).ready
        with pytest.raises(SetupError, match="no Ollama answers"):
            await engine.check()


@pytest.mark.parametrize(
    "line",
    [
        HTML,
        b"[]",
        b"7",
        b"[" * 60_000,
        b'{"message": 1}',
        b'{"message": {"content": 1}}',
        b'{"done": true, "done_reason": "stop", "eval_count": "a"}',
        b'{"done": true, "done_reason": "stop", "eval_count": -1}',
        b'{"done": true, "done_reason": []}',
    ],
)
async def test_a_line_of_an_answer_that_is_not_ollama_s_is_an_engine_error(tmp_path: Path, line: bytes) -> None:
    request = conversation.request([Message("user", "Hi")], Wishes(), read(small_release(tmp_path)).manifest.prompt)
    async with speaking({"/api/chat": b'{"message": {"content": "Hi"}}\n' + line + b"\n"}) as engine:
        stream = engine.chat("trinity:x", request)
        assert await anext(stream) == Delta("Hi")
        with pytest.raises(EngineError, match=r"says something else|ended the answer"):
            await anext(stream)


TOLD = json.dumps({"message": {"content": "Hi"}, "done": True, "done_reason": "stop", "prompt_eval_count": 2, "eval_count": 1}) + "\n"
REPLY = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{len(TOLD):x}\r\n{TOLD}\r\n".encode()
"""A whole answer but for the end of its HTTP."""
END = b"0\r\n\r\n"


@pytest.mark.parametrize(("lag_s", "connections"), [(0.0, 1), (0.01, 1), (60.0, 2)])
async def test_a_second_answer_comes_over_the_first_one_s_connection_unless_that_does_not_end(
    tmp_path: Path, lag_s: float, connections: int
) -> None:
    """`lag_s`: between an answer's last word and the end of its HTTP."""
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while await reader.read(1 << 16):
            writer.write(REPLY)
            await asyncio.sleep(lag_s)
            writer.write(END)

    request = conversation.request((Message("user", "Hi"),), Wishes(), read(small_release(tmp_path)).manifest.prompt)
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    engine = OllamaEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", slots=1)
    async with asyncio.timeout(5):
        for _ in range(2):
            assert [type(event) async for event in engine.chat("model", request)] == [Delta, Finish]
    await engine.close()
    server.close()
    for writer in writers:
        writer.close()
    assert len(writers) == connections


async def test_a_kept_connection_that_is_closed_under_a_request_costs_no_answer(tmp_path: Path) -> None:
    """As a proxy in between does, whose idle connections end: the request goes out once more, over a new one, and only once."""
    requests: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Of each connection the first request is answered and the second one is not; the fourth request of all never is."""
        for number in range(2):
            if not await reader.read(1 << 16):
                break
            requests.append(number)
            if number == 1 or len(requests) >= 4:
                break
            writer.write(REPLY + END)
        writer.close()

    request = conversation.request((Message("user", "Hi"),), Wishes(), read(small_release(tmp_path)).manifest.prompt)
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    engine = OllamaEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", slots=1)
    async with asyncio.timeout(5):
        for _ in range(2):
            assert [type(event) async for event in engine.chat("model", request)] == [Delta, Finish]
        assert requests == [0, 1, 0]
        with pytest.raises(EngineError, match="broke off"):
            _ = [event async for event in engine.chat("model", request)]
    await engine.close()
    server.close()
