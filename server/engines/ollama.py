"""A running Ollama: its native /api/chat, since its OpenAI endpoint overrides sampling and loses errors in mid-stream.

Answers go over engines/client.py; the rare admin calls over Ollama's own package. Ollama checks and counts nothing by itself, so:
`truncate` and `shift` are off (else a long prompt is cut silently), a stream without `done` is an error (Ollama has no
other sign for its own death), and nothing that reloads the model (num_ctx and such) ever goes into a request.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx  # the package ollama's own, whose errors it lets through
import ollama

from server.chat import ChatRequest, Delta, Event, Finish, Message
from server.engines import Status, probes, said
from server.engines.client import FAILED, Http, Reply, let_end, text_of
from server.engines.lines import lines
from server.errors import EngineError, PromptTooLong, SetupError
from server.manifest import Manifest, Prompt, Release

OLDEST = (0, 31, 2)
"""Older ones have CVE-2026-7482 (memory read through a GGUF, fixed in 0.17.1) or allocate without bound (fixed in 0.31.2)."""
ADMIN_TIMEOUT_S = 600.0
"""For creating and copying a model: minutes, for a 12B on a slow disk."""
LOOK_TIMEOUT_S = 5.0
"""For what must answer at once or counts as not there."""
CHUNK_BYTES = 1 << 20
NOT_THERE = (*FAILED, httpx.HTTPError, ollama.ResponseError, ConnectionError)


class OllamaEngine:
    def __init__(self, url: str, slots: int) -> None:
        self.slots = slots
        self.url = url.rstrip("/")
        self._http = Http(keep_alive=True)
        self._admin = ollama.AsyncClient(host=self.url, timeout=ADMIN_TIMEOUT_S, trust_env=False)
        self._digests: dict[str, str] = {}
        self._placed: dict[str, tuple[Manifest, str]] = {}

    async def check(self) -> None:
        try:
            version = str((await self._look()).json()["version"])
        except (*FAILED, *said.MISSHAPEN) as error:
            raise SetupError(
                f"no Ollama answers at {self.url} ({error or type(error).__name__}): start it with `ollama serve`, "
                "name another place with --ollama-url, or take --engine embedded"
            ) from error
        if _numbers(version) < OLDEST:
            raise SetupError(f"Ollama {version} at {self.url} has known holes: update it to {'.'.join(map(str, OLDEST))} or newer")

    async def load(self, release: Release) -> str:
        """Place it unless it is there, put its probes to it, and only then move NAME:latest."""
        with self._asked_to(f"take {release.model}"):
            digest = await self._digest(release.model)
            if self._placed.get(release.model) != (release.manifest, digest):
                await self.place(release)
            await probes.check(self, release.model, release)
            await self._admin.copy(release.model, f"{release.manifest.name}:latest")
            digest = await self._digest(release.model)
        self._digests[release.model] = digest
        return digest

    async def place(self, release: Release) -> None:
        """Upload the GGUF if it is missing, and create NAME:RELEASE; nothing is loaded into memory."""
        with self._asked_to(f"take {release.model}"):
            await self._upload(release)
            await self._create(release)
            self._placed[release.model] = (release.manifest, await self._digest(release.model))

    async def lacks(self, release: Release) -> int:
        with self._asked_to(f"say whether it has {release.model}"):
            there = (await self._http.ask("HEAD", self._blob(release), timeout_s=LOOK_TIMEOUT_S)).status == 200
        return 0 if there else release.manifest.files["gguf"].num_bytes

    async def held_bytes(self) -> int:
        with self._asked_to("say what it has loaded"):
            running = await self._admin.ps()
        return sum((item.size or 0) - (item.size_vram or 0) for item in running.models)

    async def prune(self, name: str, keep: Collection[str]) -> list[str]:
        """Only NAME:<run>-<12 hexadecimal digits>, as releases are called: what a person named otherwise is theirs."""
        with self._asked_to(f"delete older releases of {name}"):
            listed = [item.model or "" for item in (await self._admin.list()).models]
            older = [model for model in listed if re.fullmatch(rf"{re.escape(name)}:.+-[0-9a-f]{{12}}", model) and model not in keep]
            for model in older:
                await self._admin.delete(model)
        return older

    async def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]:
        body = {**_body(model, request.messages), "stream": True, "options": _options(request)}
        if request.schema is not None:
            body["format"] = request.schema
        try:
            async with self._http.stream(f"{self.url}/api/chat", body) as response:
                if response.status != 200:
                    raise _failure(await text_of(response), response.status)
                async for line in lines(response.content.iter_any()):
                    for event in _events(line):
                        if not isinstance(event, Finish):
                            yield event
                            continue
                        try:
                            yield event  # first: a whole answer stays one, however late its stream's end
                        finally:
                            await let_end(response)
                        return
        except FAILED as error:
            raise EngineError(f"Ollama at {self.url} broke off or is not there: {error or type(error).__name__}") from error
        raise EngineError("Ollama's answer ended without its end")

    async def render(self, model: str, messages: Sequence[Message]) -> str:
        try:
            body = {**_body(model, messages), "stream": False, "_debug_render_only": True}
            response = await self._http.ask("POST", f"{self.url}/api/chat", body)
        except FAILED as error:
            raise EngineError(f"Ollama at {self.url} is not there: {error or type(error).__name__}") from error
        if response.status != 200:
            raise _failure(response.text, response.status)
        with said.understood(f"Ollama at {self.url}", response.text):
            rendered = response.json().get("_debug_info", {}).get("rendered_template")
        if not isinstance(rendered, str):
            raise EngineError(f"Ollama at {self.url} does not show the prompt that it renders, so that no release can be checked there")
        return rendered

    async def status(self, model: str) -> Status:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                version = (await self._look()).json()["version"]
                digest, device = await self._digest(model), await self._device(model)
        except (*NOT_THERE, *said.MISSHAPEN) as error:
            return Status(False, "", f"Ollama at {self.url} does not answer: {error or type(error).__name__}")
        if not digest or digest != self._digests.get(model, digest):
            return Status(False, digest, f"Ollama at {self.url} no longer has {model} as it was loaded: load it again")
        return Status(True, digest, f"Ollama {version} at {self.url}", device)

    async def unload(self, model: str) -> None:
        """Once its last answer is given; Ollama loads nothing for this."""
        with self._asked_to(f"unload {model}"):
            await self._admin.generate(model, keep_alive=0)

    async def close(self) -> None:
        await self._http.close()
        await self._admin.close()  # type: ignore[no-untyped-call]  # not annotated there

    async def _look(self) -> Reply:
        return await self._http.ask("GET", f"{self.url}/api/version", timeout_s=LOOK_TIMEOUT_S)

    def _blob(self, release: Release) -> str:
        return f"{self.url}/api/blobs/sha256:{release.sha256}"

    @contextmanager
    def _asked_to(self, do: str) -> Iterator[None]:
        """Whatever goes wrong with an admin call is one EngineError."""
        try:
            yield
        except (*NOT_THERE, *said.MISSHAPEN) as error:  # the package reads whatever comes, a proxy's HTML too
            raise EngineError(f"Ollama at {self.url} did not {do}: {error or type(error).__name__}") from error

    async def _upload(self, release: Release) -> None:
        if not (size := await self.lacks(release)):
            return
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        response = await self._http.ask("POST", self._blob(release), content=_chunks(release.gguf), headers=headers)
        if response.status not in (200, 201):
            raise _failure(response.text, response.status)

    async def _create(self, release: Release) -> None:
        """A broken GGUF is answered with HTTP 200 and an error in the last line, hence read to the word success."""
        prompt = release.manifest.prompt
        last = ""
        steps = await self._admin.create(
            release.model,
            files={"model.gguf": f"sha256:{release.sha256}"},
            template=prompt.template,
            parameters=_parameters(prompt),
            stream=True,
        )
        async for step in steps:
            last = step.status or last
        if last != "success":
            raise EngineError(f"Ollama stopped creating {release.model} at {last!r}")

    async def _digest(self, model: str) -> str:
        listed = await self._admin.list()
        return next((item.digest or "" for item in listed.models if item.model == model), "")

    async def _device(self, model: str) -> Literal["cpu", "gpu", "cpu and gpu", ""]:
        running = await self._admin.ps()
        found = next((item for item in running.models if item.model == model), None)
        if found is None or not found.size:
            return ""
        on_gpu = found.size_vram or 0
        return "cpu" if not on_gpu else "gpu" if on_gpu >= found.size else "cpu and gpu"


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _body(model: str, messages: Sequence[Message]) -> dict[str, Any]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return {"model": model, "messages": turns, "truncate": False, "shift": False, "keep_alive": -1}


def _options(request: ChatRequest) -> dict[str, Any]:
    options = {
        "num_predict": request.max_tokens,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
        "stop": list(request.stop),
    }
    return options if request.seed is None else {**options, "seed": request.seed}


def _parameters(prompt: Prompt) -> dict[str, Any]:
    """As in the release's Modelfile, for those who talk to Ollama without the gateway."""
    return {"stop": list(prompt.stop), "num_ctx": prompt.num_ctx, **prompt.sampling.model_dump()}


def _events(line: str) -> list[Event]:
    """One line of Ollama's stream."""
    if not line.strip():
        return []
    with said.understood("Ollama", line):
        tree = json.loads(line)
        if "error" in tree:
            raise _failure(line, 500)
        text = said.text(tree.get("message", {}).get("content"))
        events: list[Event] = [Delta(text)] if text else []
        if tree.get("done"):
            if tree.get("done_reason") not in ("stop", "length"):
                raise EngineError(f"Ollama ended the answer because of {tree.get('done_reason')!r}")
            events.append(Finish(tree["done_reason"], said.usage(tree.get("prompt_eval_count", 0), tree.get("eval_count", 0))))
    return events


def _failure(text: str, status: int) -> EngineError | PromptTooLong:
    """Ollama's error, whose text may be llama.cpp's JSON inside a string."""
    tokens, context = re.search(r"n_prompt_tokens\D+(\d+)", text), re.search(r"n_ctx\D+(\d+)", text)
    if "exceed_context_size" in text and tokens and context:
        return PromptTooLong(int(tokens[1]), int(context[1]))
    try:
        message = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        message = text
    return EngineError(f"Ollama answers {status}: {str(message)[:300]}")
