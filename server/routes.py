"""The gateway's paths."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server import conversation, translate
from server.admission import Admission, Answer
from server.chat import Event
from server.engines import Engine
from server.release import Keeper
from server.replies import EventStream, read, unless_gone
from server.schemas import ChatBody, CompletionBody
from server.settings import Settings

CHAT_EXAMPLE = '{"message": "Hello"}'
COMPLETION_EXAMPLE = '{"messages": [{"role": "user", "content": "Hello"}]}'


@dataclass(frozen=True)
class Gateway:
    """What the paths need; one per application."""

    settings: Settings
    engine: Engine
    keeper: Keeper
    admission: Admission

    def answer(self, asked: translate.Asked) -> tuple[Answer, str]:
        """An answer that has not started, and the name of the model that will give it.

        Raises:
            NotReady, ReleaseError: nothing is served. BadRequest: the conversation or the model's name cannot be.
        """
        release = self.keeper.serving()
        translate.check_model(asked.model, release)
        conversation.request(asked.messages, asked.wishes, release.manifest.prompt)  # what cannot be is refused before it waits
        return Answer(self.admission, self._events(asked)), release.model

    async def _events(self, asked: translate.Asked) -> AsyncGenerator[Event]:
        """The answer of the release that is served once it is this request's turn; that one stays loaded until the end."""
        async with self.keeper.lease() as release:
            request = conversation.request(asked.messages, asked.wishes, release.manifest.prompt)
            async with aclosing(self.engine.chat(release.model, request)) as events:
                async for event in events:
                    yield event


def router(gateway: Gateway) -> APIRouter:
    paths = APIRouter()
    limit = gateway.settings.max_body_bytes

    @paths.post("/chat")
    async def chat(request: Request) -> Response:
        body = await read(request, ChatBody, limit, CHAT_EXAMPLE)
        asked = translate.chat(body, "text/event-stream" in request.headers.get("accept", ""))
        answer, model = gateway.answer(asked)
        id = f"chat-{uuid.uuid4().hex}"
        if asked.stream:
            return await _stream(gateway, request, answer, "", translate.chat_events(id, model))
        return JSONResponse(translate.chat_reply(id, model, await _whole(request, answer)))

    @paths.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        body = await read(request, CompletionBody, limit, COMPLETION_EXAMPLE)
        asked = translate.completion(body)
        answer, model = gateway.answer(asked)
        id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if asked.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await _stream(gateway, request, answer, *translate.completion_events(id, model, created, include_usage))
        return JSONResponse(translate.completion_reply(id, model, created, await _whole(request, answer)))

    @paths.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(translate.models(gateway.keeper.serving()))

    @paths.get("/healthz")
    async def healthz() -> Response:
        """The process lives; says nothing about the engine."""
        return JSONResponse({"status": "ok"})

    @paths.get("/readyz")
    async def readyz() -> Response:
        """The release is loaded and its engine would answer now; else 503 with what to do."""
        detail = await gateway.keeper.ready()
        return JSONResponse({"status": "ready", "model": gateway.keeper.serving().model, "engine": detail})

    return paths


async def _whole(request: Request, answer: Answer) -> translate.Whole:
    async def collect() -> translate.Whole:
        await answer.start()
        return translate.whole([event async for event in answer.events()])

    async with answer:
        return await unless_gone(request.receive, collect())


async def _stream(gateway: Gateway, request: Request, answer: Answer, opening: str, write: translate.Writer) -> Response:
    """Headers go out only once the first event is there: what fails before that is a plain error with its own status."""
    async with AsyncExitStack() as undo:
        await undo.enter_async_context(answer)
        await unless_gone(request.receive, answer.start())
        undo.pop_all()  # the stream owns the answer from here on
    return EventStream(answer, opening, write, gateway.settings.ping_s, request.state.request_id)
