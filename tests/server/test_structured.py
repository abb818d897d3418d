from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal

import pytest

from server.chat import Delta, Event, Finish, Usage
from server.errors import EngineError
from server.structured import whole_json

pytestmark = pytest.mark.anyio


class Answer:
    def __init__(self, *texts: str, reason: Literal["stop", "length"] = "stop") -> None:
        self.events = [*(Delta(text) for text in texts), Finish(reason, Usage(1, len(texts)))]
        self.closed = False

    async def stream(self) -> AsyncGenerator[Event]:
        try:
            for event in self.events:
                yield event
        finally:
            self.closed = True


async def test_json_in_pieces_passes_as_it_came() -> None:
    answer = Answer('{"a"', ": [1, ", "2]}")
    assert [event async for event in whole_json(answer.stream())] == answer.events


@pytest.mark.parametrize("texts", [(), ("Sure, here it is: {}",), ('{"a": 1',), ("{}", "{}")])
async def test_an_answer_that_ended_and_is_no_json_is_an_error(texts: tuple[str, ...]) -> None:
    events = whole_json(Answer(*texts).stream())
    assert [await anext(events) for _ in texts] == [Delta(text) for text in texts]
    with pytest.raises(EngineError, match="is not the JSON that response_format asked for"):
        await anext(events)


async def test_a_cut_answer_says_so_and_is_no_error() -> None:
    answer = Answer('{"a": 1', reason="length")
    assert [event async for event in whole_json(answer.stream())][-1] == answer.events[-1]


async def test_who_leaves_early_closes_the_engine_s_stream() -> None:
    answer = Answer("1", "2")
    events = whole_json(answer.stream())
    await anext(events)
    await events.aclose()
    assert answer.closed
