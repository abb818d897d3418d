"""Answers that were asked to meet a JSON schema do, or are errors.

Engines steer by the schema, but give it up when they cannot follow it: llama.cpp says so in its log alone and answers 200 (its
issue 19051), and so does whatever is built on it. Hence the schema is read before an engine sees it, and the answer after: by a
child process (structured_child.py), since a few lines of schema can keep any reader busy for years.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from server.chat import Delta, Event
from server.errors import BadRequest, EngineError

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("structured_child.py")
READ_S = 5.0
"""Longest time that reading a schema may take, and then reading the answer; the process's start, 0.1 s, is in the first."""
MAX_CHARS = 65_536
"""Longest schema as JSON text."""
MAX_ITEMS = 4096
"""Longest list that a schema may count: llama.cpp writes out every place of it, and a thousand million stop it for minutes (tried)."""
COUNTING = ("minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties")
WHERE = "response_format.json_schema.schema"


def check(schema: Mapping[str, Any]) -> None:
    """What a glance shows. Raises BadRequest: it is too large, counts too far, or holds a number that JSON has not."""
    try:
        length = len(json.dumps(schema, allow_nan=False))
    except ValueError as error:
        raise BadRequest(f"{WHERE}: a number in it is larger than any that is read") from error
    if length > MAX_CHARS:
        raise BadRequest(f"{WHERE}: it is {length} characters long, and {MAX_CHARS} are read")
    if large := next((f"{name} {count}" for name, count in _counts(schema) if count > MAX_ITEMS), None):
        raise BadRequest(f"{WHERE}: {large} is more than {MAX_ITEMS}: leave it out")


def _counts(schema: Any) -> Iterator[tuple[str, float]]:
    """Every number at a counting keyword, at any depth."""
    parts = schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ()
    if isinstance(schema, Mapping):
        yield from ((name, count) for name in COUNTING if isinstance(count := schema.get(name), int | float))
    for part in parts:
        yield from _counts(part)


async def checked(events: AsyncGenerator[Event], schema: Mapping[str, Any]) -> AsyncGenerator[Event]:
    """The events as they come; raises EngineError in place of a Finish that would end something else. A cut answer is cut.

    Raises BadRequest before the first event: `schema` is no JSON Schema, refers to something outside of itself, or cannot be read in time.
    """
    parts: list[str] = []
    async with aclosing(events), _reader(schema) as reader:
        async for event in events:
            if isinstance(event, Delta):
                parts.append(event.text)
            elif event.reason == "stop":
                await _judge("".join(parts), reader)
            yield event


@asynccontextmanager
async def _reader(schema: Mapping[str, Any]) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process that has read the schema and waits for the answer. Raises BadRequest."""
    pipe = asyncio.subprocess.PIPE
    # -P: this file's directory must not come before the packages it imports. A session of its own: Ctrl-C is for the gateway.
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(CHILD), stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise EngineError(f"the process that reads schemas does not start: {error.strerror}") from error
    try:
        try:
            problem = await _told(process, schema)
        except TimeoutError:
            raise BadRequest(f"{WHERE}: it cannot be read in time: a simpler one may help") from None
        if problem:
            raise BadRequest(f"{WHERE}: {problem}")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _judge(text: str, reader: asyncio.subprocess.Process) -> None:
    """Raises EngineError: `text` does not meet the schema, or nobody could tell."""
    try:
        problem = await _told(reader, text)
    except TimeoutError:
        raise EngineError("the answer could not be checked against the schema in time: a simpler schema may help") from None
    if problem:
        raise EngineError(f"the answer is not what response_format asked for ({problem}): a simpler schema may help")


async def _told(process: asyncio.subprocess.Process, value: Any) -> str | None:
    """What the process finds wrong with `value`. Raises TimeoutError when it says nothing, killed or dead of it (a stack, a memory)."""
    assert process.stdin and process.stdout
    line = b""
    async with asyncio.timeout(READ_S):
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            pass
    if not line:
        log.warning("the process that reads schemas died (exit code %s)", await process.wait())
        raise TimeoutError
    problem: str | None = json.loads(line)
    return problem
