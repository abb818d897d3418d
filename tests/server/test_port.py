"""Connections that are slow, many or no HTTP, spoken to over plain sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from server.chat import Delta, Event, Finish, Usage
from server.errors import SetupError
from server.port import listen
from tests.server.scripted import ScriptedEngine, serving, small_release, until

pytestmark = pytest.mark.anyio
HEAD = b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path)
    return tmp_path


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self, timeout_s: float = 10) -> bytes:
        """Everything until the server closes; TimeoutError if it does not."""
        parts = []
        with suppress(ConnectionResetError):
            while part := await asyncio.wait_for(self.reader.read(65536), timeout_s):
                parts.append(part)
        return b"".join(parts)

    async def trickle(self, data: bytes, pause_s: float) -> float:
        """Send byte by byte until the server has had enough; returns the seconds that it took."""
        began = time.monotonic()
        with suppress(ConnectionError):
            for byte in data:
                self.send(bytes([byte]))
                await self.writer.drain()
                await asyncio.sleep(pause_s)
                if self.reader.at_eof() or self.writer.is_closing():
                    break
        return time.monotonic() - began


@asynccontextmanager
async def connected(client: httpx2.AsyncClient, limit: int = 65536) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=limit)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def parsed(raw: bytes) -> tuple[int, dict[str, str], dict[str, str]]:
    """Status, headers and the error of one raw reply."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    return int(first.split()[1]), headers, json.loads(body)["error"]


async def alive(client: httpx2.AsyncClient) -> bool:
    return (await client.post("/chat", json={"message": "Hi"})).status_code == 200


async def test_headers_that_trickle_are_cut_off_in_time_the_first_as_the_second(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases, header_timeout_s=0.4) as client:
        async with connected(client) as silent, connected(client) as slow, connected(client) as kept:
            kept.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await kept.reader.readuntil(b'{"status":"ok"}')
            seconds = await asyncio.gather(slow.trickle(HEAD * 20, 0.05), kept.trickle(b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 99, 0.05))
            assert await silent.rest() == await slow.rest() == await kept.rest() == b""
        assert max(seconds) < 5
        assert await alive(client)


async def test_hundreds_of_slow_connections_do_not_keep_anybody_waiting(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases, header_timeout_s=1.0) as client:
        opened = [await asyncio.open_connection(client.base_url.host, client.base_url.port) for _ in range(300)]
        for _, writer in opened:
            writer.write(b"POST /chat HTTP/1.1\r\nX-A: ")
        began = time.monotonic()
        assert await alive(client)
        assert time.monotonic() - began < 1
        for reader, writer in opened:
            with suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()


async def test_a_quick_client_may_think_between_requests_and_wait_long_for_its_answer(releases: Path) -> None:
    engine = ScriptedEngine([0.5, *ScriptedEngine().script])
    async with serving(engine, releases, header_timeout_s=0.2) as client, connected(client) as kept:
        for _ in range(2):
            kept.send(HEAD + b'Content-Length: 16\r\n\r\n{"message": "a"}')
            assert b"200" in await kept.reader.readuntil(b"\r\n")
            await kept.reader.readuntil(b'"total_tokens":7}}')
            await asyncio.sleep(0.3)


async def test_a_body_that_trickles_is_a_408(releases: Path) -> None:
    engine = ScriptedEngine()
    async with serving(engine, releases, body_timeout_s=0.3) as client:
        for length in (b"Content-Length: 999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3\r\n{\n\n\r\n"):
            async with connected(client) as slow:
                slow.send(HEAD + length)
                reading = asyncio.create_task(slow.rest())
                await slow.trickle(b" " * 99, 0.05)
                status, headers, error = parsed(await reading)
            assert (status, headers["connection"], error["code"]) == (408, "close", "body_too_slow")
        assert await alive(client)
    assert len(engine.asked) == 1


async def test_a_body_that_nobody_waits_for_cannot_keep_its_connection(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases, header_timeout_s=0.3) as client, connected(client) as slow:
        slow.send(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n")
        await slow.reader.readuntil(b"not_found")
        assert await slow.trickle(b" " * 99, 0.05) < 2


async def test_who_sends_far_too_much_still_gets_to_read_why(releases: Path) -> None:
    """Closing at once would reset the connection under the client, who would see no reply at all."""
    async with serving(ScriptedEngine(), releases) as client:
        for _ in range(3):
            reply = await client.post("/chat", content=b" " * 30_000_000, headers={"Content-Type": "application/json"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_client_that_does_not_read_is_cut_off_and_its_slot_is_free(releases: Path) -> None:
    flood: list[Event | float] = [Delta("x" * 4096), 0.0] * 20_000
    engine = ScriptedEngine([*flood, Finish("stop", Usage(1, 1))])
    async with serving(engine, releases, stall_timeout_s=0.5) as client:
        async with connected(client, limit=1024) as deaf:
            deaf.send(HEAD + b'Content-Length: 30\r\n\r\n{"message":"a", "stream":true}')
            await until(lambda: engine.running == 1)
            began = time.monotonic()
            await until(lambda: engine.running == 0)
            assert 0.4 < time.monotonic() - began < 5
        engine.script = ScriptedEngine().script
        assert await alive(client)
    assert engine.cancelled == 1


async def test_more_connections_than_are_allowed_are_refused_until_one_closes(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases, max_connections=2) as client:
        async with connected(client), connected(client), connected(client) as third:
            status, headers, error = parsed(await third.rest())
            assert (status, headers["retry-after"], error["code"]) == (503, "2", "too_many_connections")
        await asyncio.sleep(0.05)
        assert await alive(client)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\x00c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX A: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX-A : b\r\n\r\n",
        b"POST /chat HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /chat HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /chat HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"b" * 400_000,
        b"GET /" + b"a" * 400_000,
    ],
    ids=lambda raw: repr(raw[:60]),
)
async def test_what_is_no_http_is_refused_in_the_one_shape_and_costs_nothing(
    releases: Path, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        async with connected(client) as strange:
            strange.send(raw)
            status, headers, error = parsed(await strange.rest())
        assert await alive(client)
    assert (400 <= status < 502, set(error)) == (True, {"message", "type", "code", "request_id"})
    assert headers["x-request-id"] == error["request_id"]
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_chunks_that_are_none_end_the_connection_and_nothing_else(releases: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine([0.2, *ScriptedEngine().script])
    async with serving(engine, releases) as client:
        for path in (b"/chat", b"/nothing"):
            async with connected(client) as strange:
                strange.send(HEAD.replace(b"/chat", path) + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n")
                await strange.rest()
        async with connected(client) as pipelining:  # what follows a good request is answered or refused, not mixed into it
            pipelining.send(HEAD + b'Content-Length: 16\r\n\r\n{"message": "a"}\x00\x00\r\n\r\n')
            assert (await pipelining.rest()).startswith(b"HTTP/1.1 200")
        assert await alive(client)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_replies_on_a_connection_that_stays_wait_for_nobody_s_acknowledgement(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        await client.get("/healthz")
        began = time.monotonic()
        for _ in range(50):
            await client.get("/healthz")
        assert time.monotonic() - began < 1.5, "with Nagle's algorithm it is 40 ms each"


@pytest.mark.parametrize(("host", "words"), [("a" * 80, "no such address"), ("192.0.2.1", "cannot listen")])
async def test_an_address_that_is_not_ours_is_said(host: str, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        listen(host, 0)
