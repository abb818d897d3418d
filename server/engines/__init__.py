"""What every engine does for the gateway. Each module here alone knows its engine's wire format, both ways."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from server.chat import ChatRequest, Event, Message
from server.manifest import Release


@dataclass(frozen=True, slots=True)
class Status:
    ready: bool
    """The model is there and the engine would answer now."""
    digest: str
    """sha256 of the GGUF that is loaded, or the engine's own name for it; empty when nothing is."""
    detail: str
    """One line for people: version and device, or what is wrong."""
    device: Literal["cpu", "gpu", "cpu and gpu", ""] = ""
    """What it computes on; empty: the engine does not say."""


class Engine(Protocol):
    """Admission owns slots, queue and time-outs; an engine owns none of them."""

    slots: int
    """Answers that it computes at the same time."""

    async def check(self) -> None:
        """Cheap look before the server starts. Raises SetupError when the engine is not there."""

    def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]:
        """Deltas, then exactly one Finish; raises EngineError or PromptTooLong. aclose() cancels the work upstream."""

    async def load(self, release: Release) -> str:
        """Make `release.model` answer, after its probes; idempotent. Returns the digest that status() will show.

        Raises ReleaseError when the probes are not met (what was served before stays), EngineError when it cannot load.
        """

    async def render(self, model: str, messages: Sequence[Message]) -> str:
        """The prompt as the engine makes it of cleaned messages, without <bos>."""

    async def status(self, model: str) -> Status: ...

    async def unload(self, model: str) -> None: ...

    async def close(self) -> None: ...
