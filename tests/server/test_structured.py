from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Literal

import pytest

from server.chat import Delta, Event, Finish, Usage
from server.errors import BadRequest, EngineError
from server.structured import checked, validator

pytestmark = pytest.mark.anyio
NUMBERS = validator({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]})


class Answer:
    def __init__(self, *texts: str, reason: Literal["stop", "length"] = "stop") -> None:
        self.events: list[Event] = [*(Delta(text) for text in texts), Finish(reason, Usage(1, len(texts)))]
        self.closed = False

    async def stream(self) -> AsyncGenerator[Event]:
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
        {"enum": ["x" * 70_000]},
        {"properties": {"a": {"anyOf": [{"type": "array", "maxItems": 10**9}]}}},
        {"minContains": 1e300},
    ],
)
def test_what_is_no_schema_too_long_or_leads_outside_is_refused_in_one_line(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"^response_format\.json_schema\.schema: .+$") as caught:
        validator(schema)
    assert "\n" not in str(caught.value)
