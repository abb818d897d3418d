"""The last gate before a model answers users: it must render, count and end like the engine that made the release."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from server import conversation
from server.chat import ChatRequest, Event, Finish, Message, Wishes
from server.errors import BadRequest, ReleaseError
from server.manifest import Probe, Release

NUM_PROBES = 3
"""Enough to see a wrong template, vocabulary or stop; each costs one whole answer."""


class Answering(Protocol):
    """What a probe needs of an engine."""

    def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]: ...

    async def render(self, model: str, messages: Sequence[Message]) -> str: ...


async def check(engine: Answering, model: str, release: Release) -> None:
    """Put the release's first probes to the engine, greedily.

    Raises:
        ReleaseError: another prompt, another number of prompt tokens, or an answer that does not end by itself.
    """
    for number, probe in enumerate(release.probes[:NUM_PROBES]):
        if problem := await _problem(engine, model, release, probe):
            raise ReleaseError(f"release {release.manifest.release}, probe {number}: {problem}: it is not served")


async def _problem(engine: Answering, model: str, release: Release, probe: Probe) -> str | None:
    try:
        request = conversation.request(probe.conversation, Wishes(temperature=0.0), release.manifest.prompt)
        rendered = await engine.render(model, request.messages)
        if rendered != probe.prompt:
            return f"the engine renders another prompt, {_difference(rendered, probe.prompt)}"
        finish = await _finish(engine, model, request)
    except BadRequest as error:  # a client's mistake elsewhere, the release's own here
        return str(error)
    if finish.usage.prompt_tokens != len(probe.prompt_ids):
        return f"the engine reads {finish.usage.prompt_tokens} tokens where the trainer counted {len(probe.prompt_ids)}"
    if finish.reason != "stop":
        return f"the answer does not end by itself within {request.max_tokens} tokens"
    return None


async def _finish(engine: Answering, model: str, request: ChatRequest) -> Finish:
    async with aclosing(engine.chat(model, request)) as events:
        async for event in events:
            if isinstance(event, Finish):
                return event
    raise AssertionError("an engine ended a stream without a Finish and without an error")


def _difference(ours: str, theirs: str, around: int = 20) -> str:
    """The first place where two texts part."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    start = max(0, at - around)
    return f"at character {at} {ours[start : at + around]!r} instead of {theirs[start : at + around]!r}"
