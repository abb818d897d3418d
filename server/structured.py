"""Answers that were asked to meet a JSON schema do, or are errors.

Engines steer by the schema, but give it up when they cannot follow it: llama.cpp says so in its log alone and answers 200 (its
issue 19051), and so does whatever is built on it. Hence the schema is read before an engine sees it, and the answer after.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

import jsonschema_rs

from server.chat import Delta, Event
from server.errors import BadRequest, EngineError

MAX_CHARS = 65_536
"""Longest schema as JSON text: reading one takes time, in which nobody else is served."""

MAX_ITEMS = 4096
"""Longest list that a schema may count: llama.cpp writes out every place of it, and a thousand million stop it for minutes (tried)."""
COUNTING = ("minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties")


def validator(schema: Mapping[str, Any]) -> jsonschema_rs.Validator:
    """What decides whether an answer meets `schema`. It fetches nothing, and its patterns take linear time.

    Raises:
        BadRequest: it is no JSON Schema, too large, or refers to something outside of itself.
    """
    if (length := len(json.dumps(schema))) > MAX_CHARS:
        raise BadRequest(f"response_format.json_schema.schema: it is {length} characters long, and {MAX_CHARS} are read")
    if large := next((f"{name} {count}" for name, count in _counts(schema) if count > MAX_ITEMS), None):
        raise BadRequest(f"response_format.json_schema.schema: {large} is more than {MAX_ITEMS}: leave it out")
    try:
        return jsonschema_rs.validator_for(dict(schema), offline=True, pattern_options=jsonschema_rs.RegexOptions())
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        message = str(error).partition("\n")[0][:300]
        raise BadRequest(f"response_format.json_schema.schema: {message}") from error


def _counts(schema: Any) -> Iterator[tuple[str, float]]:
    """Every number at a counting keyword, at any depth."""
    parts = schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ()
    if isinstance(schema, Mapping):
        yield from ((name, count) for name in COUNTING if isinstance(count := schema.get(name), int | float))
    for part in parts:
        yield from _counts(part)


async def checked(events: AsyncGenerator[Event], schema: jsonschema_rs.Validator) -> AsyncGenerator[Event]:
    """The events as they come; raises EngineError in place of a Finish that would end something else. A cut answer is cut."""
    parts: list[str] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                parts.append(event.text)
            elif event.reason == "stop" and (problem := _problem("".join(parts), schema)):
                raise EngineError(f"the answer is not what response_format asked for ({problem}): a simpler schema may help")
            yield event


def _problem(text: str, schema: jsonschema_rs.Validator) -> str | None:
    try:
        schema.validate(json.loads(text))
    except jsonschema_rs.ValidationError as error:
        return error.message[:300]
    except ValueError as error:
        return f"no JSON: {error}"
    return None
