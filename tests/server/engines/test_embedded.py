"""The embedded engine's own promises: its child may die, the gateway may die, and neither leaves the other behind."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from server import conversation
from server.chat import ChatRequest, Delta, Message, Wishes
from server.engines.embedded import Child, EmbeddedEngine
from server.errors import EngineError
from server.manifest import Release, read
from tests.server.real import ROOT, lives
from tests.server.scripted import small_release, until

pytestmark = pytest.mark.anyio


def long_request(release: Release) -> ChatRequest:
    request = conversation.request([Message("user", "Hi")], Wishes(temperature=0.0), release.manifest.prompt)
    return replace(request, max_tokens=230, stop=())


async def test_a_child_that_dies_ends_its_answer_with_an_error_and_is_started_again(release: Release) -> None:
    engine = EmbeddedEngine(slots=1, threads=1, start_timeout_s=120)
    await engine.load(release)
    stream = engine.chat(release.model, long_request(release))
    assert isinstance(await anext(stream), Delta)
    pid = engine.child_pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="started again"):
        async for _ in stream:
            pass
    await until(lambda: engine.child_pid != pid, 60)
    await until(lambda: engine.child_alive, 60)
    assert (await engine.status(release.model)).ready
    request = replace(long_request(release), max_tokens=2)
    assert [event async for event in engine.chat(release.model, request)]
    await engine.close()


async def test_a_file_that_is_no_gguf_is_one_clear_error(release: Release, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    engine = EmbeddedEngine(slots=1, threads=1, start_timeout_s=60)
    with pytest.raises(EngineError, match=r"did not load .*model\.gguf"):
        await engine.load(replace(release, directory=tmp_path))
    await engine.close()


async def test_a_process_that_cannot_start_is_one_clear_error_and_is_tried_again(release: Release) -> None:
    engine = EmbeddedEngine(slots=1, threads=1, start_timeout_s=60)
    await engine.load(release)
    pid = engine.child_pid
    assert pid
    with no_new_files():
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engine.child_pid is None)
        with pytest.raises(EngineError, match="does not start: Too many open files"):
            await Child(release, slots=1, threads=1).start(60)
    await until(lambda: engine.child_alive, 60)
    await engine.close()


@contextmanager
def no_new_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as next_free:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_free.fileno() + 1, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


PARENT = """
import asyncio, sys
from pathlib import Path
from server.engines.embedded import Child
from server.manifest import read

async def main():
    child = Child(read(Path(sys.argv[1])), slots=1, threads=1)
    await child.start(60)
    print(child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_no_child_outlives_a_gateway_that_is_killed(release: Release) -> None:
    command = [sys.executable, "-c", PARENT, str(release.directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.kill()
    asyncio.run(until(lambda: not lives(pid)))


async def test_other_users_of_the_machine_cannot_ask_the_child(release: Release) -> None:
    import httpx2

    child = Child(release, slots=1, threads=1)
    await child.start(60)
    async with httpx2.AsyncClient(trust_env=False) as client:
        reply = await client.post(f"{child.address}/completion", json={"prompt": "Hi", "n_predict": 1})
    await child.close()
    assert reply.status_code == 401


@pytest.mark.parametrize(
    "line",
    [
        "<html>",
        "[]",
        "7",
        "[" * 60_000,
        '{"content": 1}',
        '{"error": 1}',
        '{"stop": true}',
        '{"stop": true, "tokens_evaluated": 1, "tokens_predicted": null}',
        '{"stop": true, "tokens_evaluated": -1, "tokens_predicted": 1}',
    ],
)
async def test_a_line_of_an_answer_that_is_not_llama_cpp_s_is_an_engine_error(tmp_path: Path, line: str) -> None:
    """An answer of a child that is none: a server that says what it is told."""
    replies = {"/tokenize": '{"tokens": [2]}', "/completion": f'data: {{"content": "Hi"}}\n\ndata: {line}\n\n'}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        content = replies[(await reader.readuntil(b"\r\n\r\n")).split()[1].decode()].encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()

    small = read(small_release(tmp_path))
    child = Child(small, 1, 1)
    engine = EmbeddedEngine(slots=1, threads=1, start_timeout_s=1)
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        child.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        stream = engine.answer(child, long_request(small))
        assert await anext(stream) == Delta("Hi")
        with pytest.raises(EngineError, match="says something else than it should"):
            await anext(stream)
        await engine.close()
