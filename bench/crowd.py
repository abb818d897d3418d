"""Clients of every kind that ask a gateway without a pause, right and wrong, and what became of every single request."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2

from bench.outcomes import Outcome, Question, Stream, broke, of_reply
from server.engines.lines import lines

HANG_S = 90.0
"""No request may take longer: the time-outs of bench.chaos' gateway, twice."""
COUNTED = ", ".join(str(number) for number in range(1, 100))
LETTERS = "a b c d e f g"
"""The untrained model says again what it is told, and counts on."""
TURNS = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "twice"}]


def connections(url: str) -> httpx2.AsyncClient:
    """A new connection for every request: one that is kept may be closed by either side at any moment, rightly."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)  # requests have time-outs of their own


class Crowd:
    """Clients that ask without a pause, and what became of every single request."""

    def __init__(self, http: httpx2.AsyncClient, flood: int) -> None:
        """flood: requests at the same time that no queue has room for."""
        self._flood = flood
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.whys: Counter[str] = Counter()
        self._http = http

    async def client(self, number: int, dice: random.Random, enough: asyncio.Event) -> None:
        ask = (plain, streaming, _streaming_openai, _plain_openai, _leaving, _slow, _hostile, _raw)[number % 8]
        while not enough.is_set():
            await self.count(ask(self._http, dice))
            await asyncio.sleep(dice.uniform(0, 0.05))  # else who is refused at once would be all that this machine does

    async def flood(self, dice: random.Random) -> None:
        await asyncio.gather(*(self.count(plain(self._http, dice)) for _ in range(self._flood)))

    async def count(self, asking: Awaitable[Outcome]) -> None:
        self.sent += 1
        outcome = await asking
        self.outcomes[outcome.kind] += 1
        self.whys[f"{outcome.kind}: {outcome.why}"] += 1


def _question(path: str, dice: random.Random, *, stream: bool = False) -> Question:
    asked, says, tokens = dice.choice([(COUNTED[:16], COUNTED, dice.randint(2, 24)), (LETTERS, LETTERS, 24)])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": asked}], "temperature": 0, "max_tokens": tokens, "stream": stream}
    if path != "/chat":
        body |= {"model": "trinity"} | ({"stream_options": {"include_usage": True}} if stream else {})
    return Question(path, body, says, stops=says == LETTERS)


Reading = Callable[[httpx2.Response, Question], Awaitable[Outcome]]


async def asked(http: httpx2.AsyncClient, question: Question, read: Reading, hang_s: float = HANG_S) -> Outcome:
    """One request and what became of it."""
    where = "before the reply"
    try:
        async with (
            asyncio.timeout(hang_s),
            http.stream("POST", question.path, json=question.body) as response,
        ):
            where = "in the reply"
            if response.status_code != 200:
                return of_reply(response.status_code, response.headers, await response.aread(), question)
            return await read(response, question)
    except (httpx2.HTTPError, TimeoutError) as error:
        return broke(error, where)


async def whole(response: httpx2.Response, question: Question) -> Outcome:
    return of_reply(200, response.headers, await response.aread(), question)


async def _events(response: httpx2.Response, question: Question | None) -> Outcome:
    stream = Stream(question)
    async for text in lines(response.aiter_bytes()):
        stream.read(text)
    return stream.end()


async def _slowly(response: httpx2.Response, question: Question) -> Outcome:
    stream = Stream(question)
    async for text in lines(response.aiter_raw(64)):
        stream.read(text)
        await asyncio.sleep(0.05)
    return stream.end()


async def plain(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    return await asked(http, _question("/chat", dice), whole)


async def _plain_openai(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    return await asked(http, _question("/v1/chat/completions", dice), whole)


async def streaming(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    return await asked(http, _question("/chat", dice, stream=True), _events)


async def _streaming_openai(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    return await asked(http, _question("/v1/chat/completions", dice, stream=True), _events)


async def _slow(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    return await asked(http, _question("/chat", dice, stream=True), _slowly)


async def _leaving(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    """Hangs up at some moment: in the queue, before the first token, in mid-stream. Whatever came before it still counts."""
    heard: list[Stream] = []

    async def read(response: httpx2.Response, question: Question) -> Outcome:
        heard.append(Stream(question))
        async for text in lines(response.aiter_bytes()):
            heard[0].read(text)
        return heard[0].end()

    asking = asyncio.create_task(asked(http, _question("/chat", dice, stream=True), read))
    done, _ = await asyncio.wait({asking}, timeout=dice.uniform(0.01, 3))
    if done:
        return asking.result()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    if not asking.cancelled():
        return asking.result()
    return heard[0].so_far() if heard else Outcome("left", "before the reply")


def _wrong_bodies(dice: random.Random) -> list[bytes]:
    """None of which may ever be answered."""
    turn = [{"role": "user", "content": "Hi"}]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    trees: list[Any] = [
        [],
        None,
        {"message": 1},
        {"messages": []},
        {"messages": TURNS},
        {"messages": turn, "model": "another"},
        {"messages": turn, "temperature": "hot"},
        {"messages": turn, "max_tokens": -1},
        {"messages": turn, "n": 2},
        {"messages": turn, "tools": [{}]},
        {"messages": image},
        {"messages": turn, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
        {"messages": [{"role": "user", "content": "one two three " * 200}], "stream": dice.random() < 0.5},
    ]
    torn = [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"messages": "\xed\xa0\x80"}', b" " * 1_200_000, dice.randbytes(300)]
    return [*(json.dumps(tree).encode() for tree in trees), *torn]


async def _hostile(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    """What cannot be answered, sent as proper HTTP."""
    path = dice.choice(["/chat", "/v1/chat/completions", "/nowhere"])
    content = dice.choice(_wrong_bodies(dice))
    if path == "/chat" and any(word in content for word in (b'"n"', b'"tools"', b"response_format", b"image_url")):
        path = "/v1/chat/completions"  # /chat reads no such fields
    kind = dice.choice(["application/json"] * 5 + ["application/x-www-form-urlencoded"])
    asked = http.stream("POST", path, content=content, headers={"Content-Type": kind})
    try:
        async with asyncio.timeout(HANG_S), asked as reply:
            if reply.headers["content-type"].startswith("text/event-stream"):  # who waits for long gets its error in a stream
                return await _events(reply, None)
            return of_reply(reply.status_code, reply.headers, await reply.aread(), None)
    except (httpx2.HTTPError, TimeoutError) as error:
        return broke(error, f"for {content[:40]!r} to {path}")


async def _raw(http: httpx2.AsyncClient, dice: random.Random) -> Outcome:
    """No HTTP, or HTTP that two servers could read in two ways: 400; or a request that its client gives up in the middle."""
    host, port = http.base_url.host, http.base_url.port
    head = f"POST /chat HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    sent, leaves = dice.choice(
        [
            ("NO HTTP AT ALL\r\n\r\n", False),
            (f"{head}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}", False),
            (f"{head}Bad Header\r\n\r\n", False),
            (f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n", False),
            (f"{head}Content-Length: 100\r\n\r\n{{", True),
            (head, True),
        ]
    )
    try:
        async with asyncio.timeout(HANG_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(sent.encode())
                await writer.drain()
                if leaves:
                    await asyncio.sleep(dice.uniform(0, 0.5))
                    return Outcome("left", "in a request")
                return _of_raw(await reader.read())
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return broke(error, f"for {sent[-40:]!r}")


def _of_raw(reply: bytes) -> Outcome:
    head, _, content = reply.partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    if not first.startswith("HTTP/1.1 "):
        return Outcome("unaccounted", f"a connection that just ends: {reply[:40]!r}")
    headers = dict(field.lower().split(": ", 1) for field in fields if ": " in field)
    return of_reply(int(first.split()[1]), headers, content, None)
