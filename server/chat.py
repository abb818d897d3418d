"""The values that pass between a request and an engine: they know neither HTTP nor a wire format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client asked for; None leaves it to the release."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation ready for any engine: cleaned, and with no setting left to an engine's own default."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    schema: Mapping[str, Any] | None = None
    """JSON Schema that the answer must meet as a JSON text; an engine that cannot do this one raises BadRequest."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens; the prompt's with <bos>."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer: `stop`, the model or a stop string ended it; `length`, it was cut."""

    reason: Literal["stop", "length"]
    usage: Usage


Event = Delta | Finish
"""A stream of events ends in exactly one Finish, or raises."""
