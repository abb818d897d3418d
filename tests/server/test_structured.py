from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import pytest

from server.chat import Delta, Event, Finish, Usage
from server.errors import BadRequest, EngineError
from server.structured import check, checked

pytestmark = pytest.mark.anyio
NUMBERS = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}


class Answer:
    def __init__(self, *texts: str, reason: Literal["stop", "length"] = "stop") -> None:
        self.events: list[Event] = [*(Delta(text) for text in texts), Finish(reason, Usage(1, len(texts)))]
        self.begun = self.closed = False

    async def stream(self) -> AsyncGenerator[Event]:
        self.begun = True
        try:
            for event in self.events:
                yield event
        finally:
            self.closed = True


async def test_an_answer_that_meets_its_schema_passes_as_it_came() -> None:
    answer = Answer('{"a"', ": [1, ", "2]}")
    assert [event async for event in checked(answer.stream(), NUMBERS)] == answer.events


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ((), "no JSON"),
        (('Sure: {"a": []}',), "no JSON"),
        (('{"a": [1',), "no JSON"),
        (("{}", "{}"), "no JSON"),
        (("{}",), '"a" is a required property'),
        (('{"a": ["1"]}',), 'is not of type "integer"'),
    ],
)
async def test_an_answer_that_ended_and_does_not_is_an_error(texts: tuple[str, ...], words: str) -> None:
    events = checked(Answer(*texts).stream(), NUMBERS)
    assert [await anext(events) for _ in texts] == [Delta(text) for text in texts]
    with pytest.raises(EngineError, match=f"is not what response_format asked for .*{words}"):
        await anext(events)


async def test_a_cut_answer_says_so_and_is_no_error() -> None:
    answer = Answer('{"a": 1', reason="length")
    assert [event async for event in checked(answer.stream(), NUMBERS)][-1] == answer.events[-1]


async def test_who_leaves_early_closes_the_engine_s_stream() -> None:
    answer = Answer("1", "2")
    events = checked(answer.stream(), NUMBERS)
    await anext(events)
    await events.aclose()
    assert answer.closed


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"pattern": "^(a|b$"},
        {"pattern": "^(?=a)b$"},  # needs backtracking, which a client could make take for ever
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:9/x"},
        {"$ref": "file:///etc/passwd"},
        {"$schema": "http://127.0.0.1:9/x"},
        {"minItems": "x"},
    ],
)
async def test_what_is_no_schema_or_leads_outside_is_refused_in_one_line_before_the_engine_is_asked(schema: dict[str, Any]) -> None:
    answer = Answer("1")
    check(schema)
    with pytest.raises(BadRequest, match=r"^response_format\.json_schema\.schema: .+$") as caught:
        await anext(checked(answer.stream(), schema))
    assert "\n" not in str(caught.value) and not answer.begun


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["x" * 70_000]},
        {"properties": {"a": {"anyOf": [{"type": "array", "maxItems": 10**9}]}}},
        {"minContains": 1e300},
        {"default": float("inf")},
        {"properties": {"a": {"const": float("nan")}}},
        {"default": 10**5000},
    ],
)
def test_a_schema_that_is_too_long_counts_too_far_or_holds_no_json_number_is_refused_at_once(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"^response_format\.json_schema\.schema: .+$"):
        check(schema)


def fanning_out(levels: int) -> dict[str, Any]:
    """Says 2^levels times that the answer is a number."""
    steps = {f"a{n + 1}": {"allOf": [{"$ref": f"#/$defs/a{n}"}] * 2} for n in range(levels)}
    return {"$defs": {"a0": {"type": "number"}, **steps}, "$ref": f"#/$defs/a{levels}"}


async def longest_pause_s() -> float:
    """How long the event loop lets others wait, for ever until cancelled."""
    longest = 0.0
    try:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began)
    except asyncio.CancelledError:
        return longest


@pytest.mark.parametrize(
    ("schema", "text"),
    [(fanning_out(40), "1"), ({"items": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}, "[" * 60 + "]" * 60)],
    ids=["fan-out", "recursion"],
)
async def test_a_schema_that_takes_years_is_given_up_in_time_and_others_are_served_meanwhile(schema: dict[str, Any], text: str) -> None:
    ticking = asyncio.create_task(longest_pause_s())
    check(schema)
    with pytest.raises(EngineError, match="could not be checked against the schema in time"):
        async with asyncio.timeout(15):
            _ = [event async for event in checked(Answer(text).stream(), schema)]
    ticking.cancel()
    assert await ticking < 1


async def test_a_schema_that_wants_all_memory_is_refused_and_others_are_served_meanwhile() -> None:
    ticking = asyncio.create_task(longest_pause_s())
    schema = {"allOf": [{"pattern": f"(a{{1000}}){{{n}}}"} for n in range(10, 1500)]}
    check(schema)
    with pytest.raises(BadRequest, match="cannot be read in time"):
        async with asyncio.timeout(15):
            await anext(checked(Answer("1").stream(), schema))
    ticking.cancel()
    assert await ticking < 1


@pytest.mark.parametrize("text", ["[" * 60_000, "[" * 60_000 + "]" * 60_000])
async def test_an_answer_that_is_nested_without_end_is_an_error(text: str) -> None:
    with pytest.raises(EngineError, match="nested too deeply"):
        _ = [event async for event in checked(Answer(text).stream(), {})]


async def test_who_leaves_while_the_answer_is_checked_stops_the_check() -> None:
    async def read() -> None:
        _ = [event async for event in checked(Answer("1").stream(), fanning_out(40))]

    reading = asyncio.create_task(read())
    await asyncio.sleep(1)
    reading.cancel()
    began = time.monotonic()
    assert isinstance((await asyncio.gather(reading, return_exceptions=True))[0], asyncio.CancelledError)
    assert time.monotonic() - began < 1
