"""An engine that says what a test tells it to, for what no real engine does on demand; and a real HTTP server around it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from server import conversation
from server.app import create_app
from server.chat import ChatRequest, Delta, Event, Finish, Message, Usage
from server.engines import Status
from server.errors import EngineError, SetupError
from server.manifest import Release
from server.port import listen, make_server
from server.settings import Settings
from tests.server.real import QUESTIONS, probe, write_release

HELLO: tuple[Event, ...] = (Delta("Hel"), Delta("lo ü"), Finish("stop", Usage(5, 2)))


class ScriptedEngine:
    """Plays `script`: events, errors to raise, and numbers of seconds to wait."""

    def __init__(self, script: Sequence[Event | Exception | float] = HELLO, slots: int = 1) -> None:
        self.slots = slots
        self.script = script
        self.asked: list[ChatRequest] = []
        self.running = 0
        self.cancelled = 0
        self.problem: Exception | None = None
        self.loaded = ""
        self.digest = ""

    async def check(self) -> None:
        if isinstance(self.problem, SetupError):
            raise self.problem

    async def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]:
        self.asked.append(request)
        self.running += 1
        finished = False
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                finished = isinstance(step, Finish)
                yield step
        finally:
            self.running -= 1
            self.cancelled += not finished

    async def load(self, release: Release) -> str:
        if self.problem:
            raise self.problem
        self.loaded = release.model
        self.digest = release.sha256
        return self.digest

    async def render(self, model: str, messages: Sequence[Message]) -> str:
        return conversation.render(messages)

    async def status(self, model: str) -> Status:
        if self.problem or model != self.loaded:
            return Status(False, "", str(self.problem or f"{model} is not loaded"))
        return Status(True, self.digest, "scripted")

    async def unload(self, model: str) -> None:
        self.loaded = ""

    async def close(self) -> None:
        if self.running:
            raise EngineError("closed with answers under way")


def small_release(releases: Path, name: str = "small-0123456789ab", **prompt: Any) -> Path:
    """A release for the scripted engine, which opens no GGUF, with the link `current` on it."""
    directory = releases / name
    directory.mkdir(parents=True)
    (directory / "model.gguf").write_bytes(b"GGUF and nothing else")
    write_release(directory, [probe(messages, [2, 3], "x") for messages in QUESTIONS], **prompt)
    link = releases / "current"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    return directory


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in other code, often in another process
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(engine: ScriptedEngine, releases: Path, *, wait: bool = True, **changes: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the server as `python -m server` makes it, on a free port."""
    settings = Settings(**{"releases": releases, "state": releases / "state", "slots": engine.slots, **changes})
    server = make_server(create_app(settings, engine), settings)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            await until(lambda: bool(engine.loaded) or not wait)
            yield client
    finally:
        server.should_exit = True
        await running


def sse(text: str) -> list[Any]:
    """The data of server-sent events; `[DONE]` stays a text, comments fall out."""
    data = [block.removeprefix("data: ") for block in text.split("\n\n") if block.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
