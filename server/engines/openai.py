"""Any server with OpenAI's API that completes text: vLLM, SGLang, llama-server and their like, started by somebody else.

/v1/completions, not /v1/chat/completions: the gateway renders the turns itself (server/conversation.py), so that no template of
the server's has a say, and the probes of a release hold its tokens to the trainer's. Whose weights it has, it cannot prove:
its model must bear the release's name, or the settings must vouch for another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from server import conversation
from server.chat import ChatRequest, Delta, Event, Finish, Message, Usage
from server.engines import Status, probes, said
from server.engines.client import FAILED, Http, text_of
from server.engines.lines import lines
from server.errors import BadRequest, EngineError, PromptTooLong, SetupError
from server.manifest import Release

LOOK_TIMEOUT_S = 5.0
"""For what must answer at once or counts as not there."""
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""For llguidance, which may be what the server reads schemas with: else it lets an answer be blanks until it is cut. Others ignore it."""


class OpenAIEngine:
    def __init__(self, url: str, slots: int, key: str = "", model: str = "") -> None:
        """`url` with /v1; `model`: the name there, where it is not the release's own."""
        self.slots = slots
        self.url = url.rstrip("/")
        self._model = model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # llama-server may hang up between two requests of one connection, and the second is lost (seen).
        self._http = Http(headers, keep_alive=False)
        self._loaded: dict[str, tuple[str, int]] = {}
        """For each of our models its name there, and its context in tokens."""

    async def check(self) -> None:
        try:
            await self._listed()
        except EngineError as error:
            raise SetupError(f"{error}: start it, name another place with --openai-url, or give its key in TRINITY_OPENAI_KEY") from error

    async def load(self, release: Release) -> str:
        """Nothing is uploaded: find the model that bears the release's name, and put the probes to it."""
        name, listed = self._model or release.model, await self._listed()
        if name not in listed:
            raise EngineError(
                f"{self.url} has no model {name} but {', '.join(listed) or 'none at all'}: start it with --served-model-name {name} (vLLM) "
                f"or --alias {name} (llama-server), or vouch for another name with --openai-model"
            )
        before = self._loaded.get(release.model)
        with ExitStack() as undo:
            self._loaded[release.model] = (name, release.manifest.prompt.num_ctx)
            if before:  # which may be answering
                undo.callback(self._loaded.update, {release.model: before})
            else:
                undo.callback(self._loaded.pop, release.model)
            await probes.check(self, release.model, release)
            undo.pop_all()
        return name

    async def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]:
        name, num_ctx = self._known(model)
        prompt = conversation.render(request.messages)
        try:
            room = await self._room(name, prompt, num_ctx)
            body = {"model": name, "prompt": prompt, **_options(request), "max_tokens": min(request.max_tokens, room)}
            async with self._http.stream(f"{self.url}/completions", body) as response:
                if response.status != 200:
                    raise _refusal(await text_of(response), response.status, request)
                answer = _Answer()
                async for line in lines(response.content.iter_any()):
                    if delta := answer.read(line):
                        yield delta
        except FAILED as error:
            raise EngineError(f"{self.url} broke off or is not there: {error or type(error).__name__}") from error
        yield answer.finish()

    async def render(self, model: str, messages: Sequence[Message]) -> str:
        return conversation.render(messages)

    async def status(self, model: str) -> Status:
        if model not in self._loaded:
            return Status(False, "", f"{model} is not loaded")
        name = self._loaded[model][0]
        try:
            listed = await self._listed()
        except EngineError as error:
            return Status(False, "", str(error))
        if name not in listed:
            return Status(False, "", f"{self.url} no longer has {name}")
        return Status(True, name, f"{name} at {self.url}")

    async def unload(self, model: str) -> None:
        """Its memory is its own business."""
        self._loaded.pop(model, None)

    async def close(self) -> None:
        await self._http.close()

    def _known(self, model: str) -> tuple[str, int]:
        if model not in self._loaded:
            raise EngineError(f"{model} is not loaded")
        return self._loaded[model]

    async def _listed(self) -> list[str]:
        try:
            response = await self._http.ask("GET", f"{self.url}/models", timeout_s=LOOK_TIMEOUT_S)
            if response.status != 200:
                raise EngineError(f"{self.url} answers {response.status}: {response.text[:300]}")
            return [str(entry["id"]) for entry in response.json()["data"]]
        except (*FAILED, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"no OpenAI API answers at {self.url} ({error or type(error).__name__})") from error

    async def _room(self, name: str, prompt: str, num_ctx: int) -> int:
        """Tokens that an answer may have. vLLM refuses a wish for more, and names its prompt's length only roughly.

        Where there is no /tokenize (vLLM, SGLang and llama-server have one) the server's own limit is all there is.
        """
        texts = {"prompt": prompt, "add_special_tokens": True} | {"content": prompt, "add_special": True, "parse_special": True}
        response = await self._http.ask("POST", f"{self.url.removesuffix('/v1')}/tokenize", {"model": name, **texts})
        if response.status != 200:
            return num_ctx
        try:
            num_tokens = len(response.json()["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{self.url}: /tokenize answers something else than tokens: {response.text[:300]}") from error
        if num_tokens >= num_ctx:
            raise PromptTooLong(num_tokens, num_ctx)
        return num_ctx - num_tokens


class _Answer:
    """One stream's state: the end needs a reason, a count and the word [DONE], which may come apart."""

    def __init__(self) -> None:
        self._reason = ""
        self._usage: Usage | None = None
        self._done = False

    def read(self, line: str) -> Delta | None:
        name, _, value = line.strip().partition(": ")
        if name not in ("data", "error"):
            return None
        if value == "[DONE]":
            self._done = True
            return None
        with said.understood("the engine", value):
            tree = json.loads(value)
            if name == "error" or "error" in tree:
                raise EngineError(f"the engine: {str(tree.get('error', tree))[:300]}")
            if counts := tree.get("usage"):
                self._usage = said.usage(counts["prompt_tokens"], counts["completion_tokens"])
            text = ""
            for choice in tree.get("choices", ()):
                self._reason = said.text(choice.get("finish_reason")) or self._reason
                text += said.text(choice.get("text"))
        return Delta(text) if text else None

    def finish(self) -> Finish:
        if not self._done:
            raise EngineError("the engine's answer ended before its end")
        if self._usage is None:
            raise EngineError("the engine counts no tokens in its streams (stream_options.include_usage)")
        reasons: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}
        if self._reason not in reasons:
            raise EngineError(f"the engine ended the answer because of {self._reason!r}")
        return Finish(reasons[self._reason], self._usage)


def _options(request: ChatRequest) -> dict[str, Any]:
    """With the names that vLLM and llama.cpp give to what OpenAI does not have; each ignores the other's."""
    options = {
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repeat_penalty,
        "repeat_penalty": request.repeat_penalty,
        "stop": list(request.stop),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.seed is not None:
        options["seed"] = request.seed
    if request.schema is not None:
        schema = {**request.schema, **COMPACT}
        options["json_schema"] = schema
        options["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return options


def _refusal(text: str, status: int, request: ChatRequest) -> EngineError | BadRequest:
    tokens = re.search(r"n_prompt_tokens\D+(\d+)|contains (?:at least )?(\d+) input tokens|has (\d+) input tokens", text)
    context = re.search(r"n_ctx\D+(\d+)|maximum context length is (\d+)", text)
    if status == 400 and tokens and context:
        return PromptTooLong(*(int(next(filter(None, found.groups()))) for found in (tokens, context)))
    if status == 400 and request.schema is not None:
        return BadRequest(f"response_format: the schema is not one that the engine can follow: {text[:300]}")
    return EngineError(f"the engine answers {status}: {text[:300]}")
