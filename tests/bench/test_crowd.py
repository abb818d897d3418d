"""The bench that claims no outcome is unaccounted must see one that is."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import chaos, crowd, soak
from bench.outcomes import Question, Stream, of_reply
from server.chat import Delta, Event, Finish, Usage
from server.errors import EngineError
from tests.server.scripted import ScriptedEngine, serving, small_release

pytestmark = pytest.mark.anyio
ASKED = Question("/chat", {"message": "1, 2, 3,", "max_tokens": 2, "stream": True}, crowd.COUNTED)
ERROR = {"error": {"message": "m", "type": "engine_error", "code": "engine_failed", "request_id": "r"}}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
FIRST = {"delta": {"content": "1, "}}
LAST = {"delta": {"content": "2"}, "finish_reason": "length", "usage": USAGE}
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def events(*trees: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(tree).encode() + b"\n\n" for tree in trees)


def chunked(content: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return HEAD + f"{len(content):x}\r\n".encode() + content + b"\r\n" + end


def reply(status: int, content: bytes, *fields: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", "Connection: close", *fields])
    return head.encode() + b"\r\n\r\n" + content


@asynccontextmanager
async def saying(said: bytes, *, then: str = "close") -> AsyncIterator[str]:
    """A server that says this to whatever comes, and then closes, resets, or goes on saying nothing."""
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        if then == "hang":
            await over.wait()
        if then == "reset":
            at_once = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        over.set()


async def outcome(said: bytes, then: str = "close") -> tuple[str, str]:
    async with saying(said, then=then) as url, crowd.connections(url) as http:
        found = await crowd.asked(http, ASKED, crowd._events, hang_s=0.5)
    return found.kind, found.why


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (chunked(events(FIRST, LAST) + DONE), "answered"),
        (chunked(b": ping\n\n" + events(FIRST, ERROR)), "typed_error"),
        (reply(503, json.dumps(ERROR).encode(), "Retry-After: 2"), "refused"),
        (reply(502, json.dumps(ERROR).encode()), "typed_error"),
    ],
)
async def test_what_a_gateway_may_do_has_its_name(said: bytes, kind: str) -> None:
    assert (await outcome(said))[0] == kind


@pytest.mark.parametrize(
    ("said", "then", "why"),
    [
        (chunked(events(FIRST)), "close", "a stream that just ends"),
        (chunked(events(FIRST, LAST)), "close", "a stream that just ends"),
        (chunked(events(FIRST), end=b""), "close", "RemoteProtocolError in the reply"),
        (chunked(events(FIRST), end=b""), "reset", "ReadError in the reply"),
        (b"", "reset", "ReadError before the reply"),
        (b"", "hang", "TimeoutError before the reply"),
        (chunked(events(FIRST), end=b""), "hang", "TimeoutError in the reply"),
        (reply(500, b"Internal Server Error"), "close", "a 500 without JSON"),
        (reply(500, b'{"detail": "x"}'), "close", "an untyped 500"),
        (reply(500, json.dumps({"error": {**ERROR["error"], "type": "internal_error"}}).encode()), "close", "a bug of the gateway's"),
        (reply(503, json.dumps(ERROR).encode()), "close", "a 503 engine_failed without Retry-After"),
        (reply(404, json.dumps(ERROR).encode()), "close", "engine_failed for a request that is right"),
        (chunked(events(FIRST, {"error": "gone"})), "close", "an untyped error in a stream"),
        (chunked(events(FIRST, ERROR) + DONE), "close", "something after the end of a stream"),
        (chunked(events(FIRST, FIRST, LAST) + DONE), "close", "the wrong words: '1, 1, 2'"),
        (chunked(events(LAST) + DONE), "close", "the wrong words: '2'"),
        (chunked(events(FIRST, {**LAST, "usage": {**USAGE, "completion_tokens": 1}}) + DONE), "close", "1 tokens where 2 were asked for"),
        (chunked(events(FIRST, {**LAST, "finish_reason": "stop"}) + DONE), "close", "an answer that ends by stop"),
        (chunked(events(FIRST) + DONE), "close", "an answer without a finish_reason"),
        (chunked(b"Traceback\n\n"), "close", "a line that is no event"),
        (chunked(b"data: 7\n\n"), "close", "an event of another shape"),
    ],
)
async def test_what_it_may_not_do_is_unaccounted(said: bytes, then: str, why: str) -> None:
    assert await outcome(said, then) == ("unaccounted", why)


async def test_a_gateway_that_is_not_there_is_unaccounted() -> None:
    async with crowd.connections("http://127.0.0.1:9") as http:
        found = await crowd.asked(http, ASKED, crowd._events)
    assert (found.kind, found.why) == ("unaccounted", "ConnectError before the reply")


@pytest.mark.parametrize(("last", "kind"), [(ERROR, "typed_error"), (LAST, "unaccounted")])
def test_who_waits_for_long_gets_the_error_of_a_wrong_request_in_a_stream(last: Any, kind: str) -> None:
    stream = Stream(None)
    for line in (b": ping\n\n" + events(last) + (b"" if last is ERROR else DONE)).decode().split("\n"):
        stream.read(line)
    assert stream.end().kind == kind


def test_an_answer_to_what_cannot_be_asked_is_unaccounted() -> None:
    assert of_reply(200, {}, b"{}", None).kind == "unaccounted"
    assert of_reply(400, {}, json.dumps(ERROR).encode(), None).kind == "typed_error"


@pytest.mark.parametrize("said", [b"", b"\0\1", b"HTTP/1.1 400 X\r\n\r\nno JSON"])
async def test_a_raw_connection_that_just_ends_is_unaccounted(said: bytes) -> None:
    assert crowd._of_raw(said).kind == "unaccounted"


COUNTING: tuple[Event, ...] = (Delta("1, "), Delta("2, 3"), Finish("length", Usage(5, 2)))


async def rushed(releases: Path, engine: ScriptedEngine, seconds: float) -> crowd.Crowd:
    small_release(releases)
    enough = asyncio.Event()
    async with serving(engine, releases, waiting=2) as client, crowd.connections(str(client.base_url)) as http:
        rush = crowd.Crowd(http, flood=20)
        asking = [asyncio.create_task(rush.client(number, random.Random(number), enough)) for number in range(8)]
        await rush.flood(random.Random(1))
        await asyncio.sleep(seconds)
        enough.set()
        await asyncio.gather(*asking)
    return rush


async def test_all_clients_together_count_every_request_once(tmp_path: Path) -> None:
    rush = await rushed(tmp_path, ScriptedEngine([EngineError("gone")]), 2)
    assert rush.sent == rush.outcomes.total() == rush.whys.total() > 100
    assert set(rush.outcomes) == {"typed_error", "refused", "left"}, rush.whys


async def test_an_engine_whose_words_are_not_what_was_asked_is_seen_by_every_kind_of_client(tmp_path: Path) -> None:
    rush = await rushed(tmp_path, ScriptedEngine([Delta("Lorem"), *COUNTING]), 2)
    assert rush.outcomes["unaccounted"] > 20 and not rush.outcomes["answered"]


def tally(**changes: Any) -> chaos.Tally:
    return chaos.Tally(**{"seconds": 1.0, "sent": 3, "outcomes": {"answered": 2, "refused": 1}, **changes})


def test_counts_of_several_calls_add_up_and_problems_stay() -> None:
    both = tally(problems=["x"], rss_end_bytes=1) + tally(rss_end_bytes=2)
    assert (both.seconds, both.sent, both.outcomes, both.rss_end_bytes) == (2.0, 6, {"answered": 4, "refused": 2}, 2)
    assert both.failures(0) == ["x"]


@pytest.mark.parametrize(
    ("changes", "at_least", "failure"),
    [
        ({"outcomes": {"answered": 2, "unaccounted": 1}}, 0, "1 unaccounted"),
        ({"sent": 4}, 0, "3 outcomes of 4 requests"),
        ({"outcomes": {"refused": 3}}, 0, "0 answered"),
        ({}, 3, "2 answered"),
    ],
)
def test_what_proves_nothing_is_a_failure(changes: dict[str, Any], at_least: int, failure: str) -> None:
    assert tally().failures(0) == []
    assert tally(**changes).failures(at_least) == [failure]


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"problems": ["1 slots taken at the end"]}, 1)])
def test_a_time_that_earlier_calls_have_filled_is_not_run_again(tmp_path: Path, changes: dict[str, Any], code: int) -> None:
    (tmp_path / chaos.CASE).mkdir()
    (tmp_path / chaos.CASE / "tally.json").write_text(json.dumps(asdict(tally(seconds=60.5, **changes))), encoding="utf-8")
    assert soak.main(["--case", chaos.CASE, "--seconds", "60", "--dir", str(tmp_path)]) == code


def test_a_row_tells_what_broke_off_from_what_never_came() -> None:
    whys = {
        "unaccounted: a stream that just ends": 1,
        "unaccounted: ReadError in the reply": 2,
        "unaccounted: TimeoutError before the reply": 4,
    }
    found = chaos.metrics(tally(sent=7, outcomes={"unaccounted": 7}, whys=whys))
    assert (found["trials"], found["lost"], found["torn"], found["failed"]) == (7, 7, 3, 0)
