"""Bodies and headers that nobody sane would send: each gets an answer of the one shape, and nothing of the server breaks."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.server.scripted import ScriptedEngine, serving, small_release

pytestmark = pytest.mark.anyio
NUM_BODIES = 10_000
FIELDS = (
    "message", "messages", "system", "role", "content", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens",
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop", "n", "tools", "response_format", "type", "text", "json_schema",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, "", "Hi", "user", "assistant", "system", "\x00", "\u2028", "\ufffe",
    "<start_of_turn>model\n", "👩‍🚀" * 9, "x" * 3000, [], {}, [[[[]]]], {"": {"": {}}}, ["\n"] * 20,
)  # fmt: skip
GOOD = (
    b'{"message": "Hi", "stream": false, "temperature": 0.5}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "stop": ["a"]}',
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "stream": true, "stream_options": {"include_usage": true}}',
)
TYPES = (b"application/json",) * 6 + (
    b"application/json; charset=utf-16",
    b"text/plain",
    b"application/x-www-form-urlencoded",
    b"a/b+json",
    b"",
)


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path)
    return tmp_path


def tree(dice: random.Random, depth: int = 3) -> Any:
    """A JSON value of the API's own words in places where they may not belong."""
    kind = dice.random()
    if depth == 0 or kind < 0.5:
        return dice.choice(VALUES)
    if kind < 0.6:
        return [tree(dice, depth - 1) for _ in range(dice.randrange(4))]
    return {dice.choice(FIELDS): tree(dice, depth - 1) for _ in range(dice.randrange(5))}


def body(dice: random.Random) -> bytes:
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.randrange(200))
    if kind == 1:  # a good one with a few bytes changed, added, left out
        content = bytearray(dice.choice(GOOD))
        for _ in range(dice.randrange(4)):
            at = dice.randrange(len(content))
            content[at : at + dice.randrange(3)] = (
                dice.randbytes(dice.randrange(3)) if dice.random() < 0.5 else bytes([dice.choice(b'{}[]",:\\0e')])
            )
        return bytes(content)
    if kind == 2:
        return json.dumps({dice.choice(FIELDS): tree(dice) for _ in range(dice.randrange(6))}, ensure_ascii=dice.random() < 0.5).encode()
    good = json.loads(dice.choice(GOOD))
    good[dice.choice(FIELDS)] = tree(dice)
    return json.dumps(good).encode()


def request(dice: random.Random) -> bytes:
    content = body(dice)
    path = dice.choice((b"/chat", b"/v1/chat/completions"))
    accept = dice.choice((b"", b"Accept: text/event-stream\r\n", b"Accept: */*\r\n"))
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n"
    return head % (path, dice.choice(TYPES), accept, len(content)) + content


async def reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next reply on a connection that stays."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split()[1])
    if b"\r\ncontent-length: " in head.lower():
        return status, await reader.readexactly(int(head.lower().split(b"\r\ncontent-length: ")[1].split()[0]))
    parts = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return status, parts


async def test_ten_thousand_random_bodies_are_answered_or_refused_in_the_one_shape(
    releases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dice = random.Random(6)
    engine = ScriptedEngine()
    seen: Counter[int] = Counter()
    async with serving(engine, releases) as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        for number in range(NUM_BODIES):
            sent = request(dice)
            writer.write(sent)
            status, content = await reply(reader)
            seen[status] += 1
            if status != 200:
                error = json.loads(content)["error"]
                assert set(error) == {"message", "type", "code", "request_id"}, (number, sent)
                assert status in (400, 404, 415) and error["message"], (number, sent, status)
        writer.close()
        assert (await client.post("/chat", json={"message": "Hi"})).status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert engine.running == 0 and len(engine.asked) == seen[200] + 1
    assert min(seen[200], seen[400], seen[415]) > NUM_BODIES // 50, f"the dice tried too little: {seen}"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 60\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 60",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b"Content-Length: 60\r\nContent-Length: 61",
        b"Content-Length: +60",
        b"Content-Length : 60",
    ],
)
async def test_a_request_whose_end_two_servers_could_see_in_two_places_is_refused(releases: Path, framing: bytes) -> None:
    """What a proxy takes for a body must never be a request of its own here."""
    async with serving(ScriptedEngine(), releases) as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + framing + b"\r\n\r\n")
        writer.write(b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\nX-A: bbbbbbbbbb\r\n\r\n")
        raw = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", raw)) == 1
    assert raw.startswith(b"HTTP/1.1 4") and b'"error"' in raw


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "localhost", "Forwarded": "for=127.0.0.1;host=localhost"},
        {"X-Original-URL": "/healthz", "X-Rewrite-URL": "/healthz"},
        {"X-HTTP-Method-Override": "GET"},
        {"Authorization": "Bearer tr-", "Cookie": "key=tr-x"},
    ],
    ids=lambda headers: next(iter(headers)),
)
async def test_headers_that_other_servers_believe_open_nothing_here(releases: Path, headers: dict[str, str]) -> None:
    async with serving(ScriptedEngine(), releases, host="::") as client:  # as if others could reach it
        replies = [await client.post("/chat", json={"message": "Hi"}, headers=headers)]
        replies += [
            await client.get(path, headers=headers)
            for path in ("/metrics", "/v1/models", "/healthz/../metrics", "/%2e/metrics", "/readyz;/metrics")
        ]
    assert {reply.status_code for reply in replies} == {401}
