"""Answers that were asked to be JSON are JSON, or errors.

llama.cpp goes on without its grammar when it cannot parse what it made of a schema, says so in its log alone and answers 200
(its issue 19051), and so does whatever is built on it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from server.chat import Delta, Event
from server.errors import EngineError


async def whole_json(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """The events as they come; raises EngineError instead of a Finish that would end something else. A cut answer is no JSON and says so."""
    parts: list[str] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                parts.append(event.text)
            elif event.reason == "stop" and (problem := _problem("".join(parts))):
                raise EngineError(f"the answer is not the JSON that response_format asked for ({problem}): a simpler schema may help")
            yield event


def _problem(text: str) -> str | None:
    try:
        json.loads(text)
    except ValueError as error:
        return str(error)
    return None
