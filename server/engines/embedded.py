"""The embedded engine: llama.cpp in a child process, started again when it dies. Knows llama.cpp's wire format.

The gateway renders the turns itself (server/conversation.py) and sends token ids, so neither llama.cpp's template engine
nor its choice of special tokens has a say. A crash there ends the answers in flight with an EngineError, nothing else.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import secrets
import sys
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any, Literal

from server import conversation
from server.chat import ChatRequest, Delta, Event, Finish, Message
from server.engines import Status, probes, said
from server.engines.client import FAILED, Http, text_of
from server.engines.lines import lines
from server.errors import BadRequest, EngineError, PromptTooLong, SetupError
from server.manifest import Release

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("llamacpp_child.py")
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""llguidance, which this llama.cpp reads schemas with, else lets the answer be blanks until it is cut (seen). Others ignore it."""
PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before the next start of a child that died; the last one for ever after."""


class Child:
    """One llama.cpp process with one model."""

    def __init__(self, release: Release, slots: int, threads: int) -> None:
        self.release = release
        self.num_ctx = release.manifest.prompt.num_ctx
        self.address = ""
        self.device: Literal["cpu", "gpu", ""] = ""
        self.key = secrets.token_hex(16)
        self._slots, self._threads = slots, threads
        self._settings = {"gguf": str(release.gguf), "num_ctx": self.num_ctx, "slots": slots, "threads": threads, "key": self.key}
        self._process: asyncio.subprocess.Process | None = None
        self._lines: deque[str] = deque(maxlen=20)
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return bool(self.address) and self._process is not None and self._process.returncode is None

    async def start(self, timeout_s: float) -> None:
        """Start the process and wait until the model is loaded. Raises EngineError with llama.cpp's last words."""
        pipe = asyncio.subprocess.PIPE
        # -P: this file's directory must not come before the packages it imports. A session of its own: Ctrl-C is for the gateway.
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", str(CHILD), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except OSError as error:
            raise EngineError(f"llama.cpp's process does not start: {error.strerror}") from error
        self._reader = asyncio.create_task(self._read_log())
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            line = b""
        if not line:
            await self.close()
            raise EngineError(f"llama.cpp did not load {self.release.gguf}: {self.last_words}")
        told = json.loads(line)
        self.address, self.device = told["address"], told["device"]

    def another(self) -> Child:
        """The same once more, not started."""
        return Child(self.release, self._slots, self._threads)

    async def wait(self) -> int | None:
        """Its exit code, once it is dead; None at once if it never lived."""
        return await self._process.wait() if self._process else None

    async def close(self) -> None:
        if self._process is None:
            return
        if self._process.stdin:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(2):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reader:
            await self._reader

    @property
    def last_words(self) -> str:
        return " | ".join(list(self._lines)[-3:]) or "it said nothing"

    async def _read_log(self) -> None:
        assert self._process and self._process.stderr
        async for line in self._process.stderr:
            self._lines.append(line.decode("utf-8", "replace").rstrip())


class Kept:
    """A child that answers, started again whenever it dies."""

    def __init__(self, child: Child, start_timeout_s: float) -> None:
        self.child = child
        self._start_timeout_s = start_timeout_s
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.child.close()

    async def _keep(self) -> None:
        """With growing pauses while it dies at once."""
        deaths = 0
        while True:
            began = asyncio.get_running_loop().time()
            code = await self.child.wait()
            deaths = deaths + 1 if asyncio.get_running_loop().time() - began < 60 else 0
            log.error("llama.cpp died (exit code %s) and is being started again: %s", code, self.child.last_words)
            await asyncio.sleep(PAUSES_S[min(deaths, len(PAUSES_S) - 1)])
            await self.child.close()
            self.child = self.child.another()
            try:
                await self.child.start(self._start_timeout_s)
                log.warning("llama.cpp is back")
            except EngineError as error:
                log.warning("%s", error)


class EmbeddedEngine:
    """One child a model. While a release takes the place of another there are two, until the old one is unloaded."""

    def __init__(self, slots: int, threads: int, start_timeout_s: float) -> None:
        self.slots = slots
        self._threads = threads
        self._start_timeout_s = start_timeout_s
        # llama.cpp's server may hang up between two requests of one connection, and the second is lost (seen); a new one costs 0.1 ms.
        self._http = Http(keep_alive=False)
        self._kept: dict[str, Kept] = {}
        self._loading = asyncio.Lock()

    @property
    def newest(self) -> Child | None:
        """The child that was loaded last."""
        return list(self._kept.values())[-1].child if self._kept else None

    @property
    def child_pid(self) -> int | None:
        return self.newest.pid if self.newest else None

    @property
    def child_alive(self) -> bool:
        return self.newest is not None and self.newest.alive

    async def check(self) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise SetupError("the embedded engine needs the package xllamacpp: pip install 'trinity[server]', or take --engine ollama")

    async def load(self, release: Release) -> str:
        async with self._loading:
            kept = self._kept.get(release.model)
            if kept and kept.child.alive and kept.child.release == release:
                return release.sha256
            async with AsyncExitStack() as undo:
                child = Child(release, self.slots, self._threads)
                undo.push_async_callback(child.close)
                await child.start(self._start_timeout_s)
                await probes.check(_Alone(self, child), release.model, release)
                undo.pop_all()
            await self.unload(release.model)  # a child of the same name: its files are the same or were replaced
            self._kept[release.model] = Kept(child, self._start_timeout_s)
            return release.sha256

    async def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]:
        async with aclosing(self.answer(self._living(model), request)) as events:
            async for event in events:
                yield event

    async def answer(self, child: Child, request: ChatRequest) -> AsyncGenerator[Event]:
        """One answer of one child. Raises PromptTooLong, or EngineError when the child fails or dies."""
        try:
            ids = await self._tokenize(child, conversation.render(request.messages))
            if len(ids) >= child.num_ctx:
                raise PromptTooLong(len(ids), child.num_ctx)
            async with self._http.stream(f"{child.address}/completion", _completion(ids, request), _auth(child)) as response:
                if response.status != 200:
                    raise _refusal(await text_of(response), response.status, request)
                async for line in lines(response.content.iter_any()):
                    for event in _events(line):
                        yield event
                        if isinstance(event, Finish):
                            return
        except FAILED as error:
            raise EngineError("llama.cpp broke off its answer; it is being started again") from error
        raise EngineError("llama.cpp's answer ended before its end")

    async def render(self, model: str, messages: Sequence[Message]) -> str:
        return conversation.render(messages)

    async def status(self, model: str) -> Status:
        if model not in self._kept:
            return Status(False, "", f"{model} is not loaded")
        child = self._kept[model].child
        detail = "llama.cpp in a child process" if child.alive else "llama.cpp died and is being started again"
        return Status(child.alive, child.release.sha256 if child.alive else "", detail, child.device)

    async def unload(self, model: str) -> None:
        if kept := self._kept.pop(model, None):
            await kept.close()

    async def close(self) -> None:
        for model in list(self._kept):
            await self.unload(model)
        await self._http.close()

    async def lacks(self, release: Release) -> int:
        """The file is read where it lies, always."""
        return release.manifest.files["gguf"].num_bytes

    async def place(self, release: Release) -> None:
        pass

    async def held_bytes(self) -> int:
        return 0

    async def prune(self, name: str, keep: Collection[str]) -> list[str]:
        return []

    def _living(self, model: str) -> Child:
        if model not in self._kept:
            raise EngineError(f"{model} is not loaded")
        child = self._kept[model].child
        if not child.alive:
            raise EngineError("llama.cpp died and is being started again: try again in a moment")
        return child

    async def tokenize(self, model: str, prompt: str) -> list[int]:
        """Token ids of a rendered prompt, as the model gets them."""
        return await self._tokenize(self._living(model), prompt)

    async def _tokenize(self, child: Child, prompt: str) -> list[int]:
        """With <bos>, and the turn markers as the single tokens they are."""
        body = {"content": prompt, "add_special": True, "parse_special": True}
        response = await self._http.ask("POST", f"{child.address}/tokenize", body, headers=_auth(child))
        if response.status != 200:
            raise EngineError(f"llama.cpp answers {response.status}: {response.text[:300]}")
        ids: list[int] = response.json()["tokens"]
        return ids


class _Alone:
    """A child that is not in service yet, for its probes."""

    def __init__(self, engine: EmbeddedEngine, child: Child) -> None:
        self._engine = engine
        self._child = child

    def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]:
        return self._engine.answer(self._child, request)

    async def render(self, model: str, messages: Sequence[Message]) -> str:
        return conversation.render(messages)


def _auth(child: Child) -> dict[str, str]:
    return {"Authorization": f"Bearer {child.key}"}


def _completion(ids: Sequence[int], request: ChatRequest) -> dict[str, Any]:
    body = {
        "prompt": list(ids),
        "n_predict": request.max_tokens,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
        "stop": list(request.stop),
        "stream": True,
        "cache_prompt": True,
    }
    chosen = {"seed": request.seed, "json_schema": None if request.schema is None else {**request.schema, **COMPACT}}
    return body | {name: value for name, value in chosen.items() if value is not None}


def _refusal(text: str, status: int, request: ChatRequest) -> EngineError | BadRequest:
    """llama.cpp's error. A 400 is about what the client chose by itself, and that is the schema alone."""
    if status == 400 and request.schema is not None:
        return BadRequest(f"response_format: the schema is not one that llama.cpp can follow: {text[:300]}")
    return EngineError(f"llama.cpp answers {status}: {text[:300]}")


def _events(line: str) -> list[Event]:
    """One line of llama.cpp's stream."""
    if not line.strip():
        return []
    name, _, value = line.partition(": ")
    if name == "error":
        raise EngineError(f"llama.cpp: {value[:300]}")
    if name != "data":
        return []
    with said.understood("llama.cpp", value):
        tree = json.loads(value)
        if "error" in tree:
            raise EngineError(f"llama.cpp: {tree['error'].get('message', tree['error'])}")
        text = said.text(tree.get("content"))
        events: list[Event] = [Delta(text)] if text else []
        if tree.get("stop"):
            usage = said.usage(tree["tokens_evaluated"], tree["tokens_predicted"])
            events.append(Finish("length" if tree.get("stop_type") == "limit" else "stop", usage))
    return events
