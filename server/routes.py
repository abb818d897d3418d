"""The gateway's paths."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server import conversation, docs, translate
from server.admission import Admission, Answer
from server.chat import ChatRequest, Event
from server.docs import failures, stream
from server.engines import Engine
from server.errors import NotReady, ReleaseError, ServerError
from server.manifest import Release
from server.release import Keeper
from server.replies import EventStream, Writing, read, refusal, unless_gone
from server.schemas import Alive, ChatBody, ChatEvent, ChatReply, CompletionBody, CompletionChunk, CompletionReply, ModelList, Ready
from server.settings import Settings
from server.structured import check, checked

CHAT_EXAMPLE = '{"message": "Hello"}'
COMPLETION_EXAMPLE = '{"messages": [{"role": "user", "content": "Hello"}]}'


@dataclass
class Served:
    """Who gives an answer; certain once its first event is there, since a request may wait while releases change."""

    model: str


@dataclass(frozen=True)
class Gateway:
    """What the paths need; one per application."""

    settings: Settings
    engine: Engine
    keeper: Keeper
    admission: Admission

    def answer(self, asked: translate.Asked) -> tuple[Answer, Served]:
        """An answer that has not started, and who gives it.

        Raises:
            NotReady, ReleaseError: nothing is served. BadRequest: the conversation or the model's name cannot be.
        """
        conversation.check_size(asked.messages, self.settings.max_messages, self.settings.max_message_chars)
        release = self.keeper.serving()
        translate.check_model(asked.model, release)
        wished = self._request(asked, release).schema  # what cannot be is refused before it waits
        served = Served(release.model)
        events = self._events(asked, served)
        if wished is not None:
            check(wished)
            events = checked(events, wished)
        return Answer(self.admission, events), served

    async def _events(self, asked: translate.Asked, served: Served) -> AsyncGenerator[Event]:
        """The answer of the release that is served once it is this request's turn; that one stays loaded until the end."""
        async with self.keeper.lease() as release:
            served.model = release.model
            request = self._request(asked, release)
            async with aclosing(self.engine.chat(release.model, request)) as events:
                async for event in events:
                    yield event

    def _request(self, asked: translate.Asked, release: Release) -> ChatRequest:
        return conversation.request(asked.messages, asked.wishes, release.manifest.prompt, self.settings.max_answer_tokens)


def router(gateway: Gateway) -> APIRouter:
    paths = APIRouter()
    limit = gateway.settings.max_body_bytes

    @paths.post(
        "/chat", response_model=ChatReply, responses=stream(ChatEvent) | failures(), openapi_extra=docs.body(ChatBody, CHAT_EXAMPLE)
    )
    async def chat(request: Request) -> Response:
        """One question or a whole conversation; one JSON object, or server-sent events that end in [DONE]."""
        body = await read(request, ChatBody, limit, CHAT_EXAMPLE)
        asked = translate.chat(body, "text/event-stream" in request.headers.get("accept", ""))
        answer, served = gateway.answer(asked)
        id = f"chat-{uuid.uuid4().hex}"
        if asked.stream:
            return await _stream(gateway, request, answer, lambda: ("", translate.chat_events(id, served.model)))
        whole = await _whole(request, answer)
        return JSONResponse(translate.chat_reply(id, served.model, whole))

    described = docs.body(CompletionBody, COMPLETION_EXAMPLE)

    @paths.post(
        "/v1/chat/completions", response_model=CompletionReply, responses=stream(CompletionChunk) | failures(), openapi_extra=described
    )
    async def completions(request: Request) -> Response:
        """OpenAI's chat completion, for every client of it: base URL SERVER/v1, and any key where the server has none."""
        body = await read(request, CompletionBody, limit, COMPLETION_EXAMPLE)
        asked = translate.completion(body)
        answer, served = gateway.answer(asked)
        id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if asked.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            write = partial(translate.completion_events, id, created=created, include_usage=include_usage)
            return await _stream(gateway, request, answer, lambda: write(served.model))
        whole = await _whole(request, answer)
        return JSONResponse(translate.completion_reply(id, served.model, created, whole))

    @paths.get("/v1/models", response_model=ModelList, responses=failures(docs.ASKED), openapi_extra={"security": docs.GUARDED})
    async def models() -> Response:
        """The model that is served, where it comes from, and what computes it."""
        release = gateway.keeper.serving()
        status = await gateway.engine.status(release.model)
        return JSONResponse(translate.models(release, gateway.settings.engine, status.device))

    @paths.get("/healthz", response_model=Alive, responses=failures(()))
    async def healthz() -> Response:
        """The process lives; says nothing about the engine."""
        return JSONResponse({"status": "ok"})

    @paths.get("/readyz", response_model=Ready, responses=failures((NotReady, ReleaseError)))
    async def readyz(request: Request) -> Response:
        """The release is loaded and its engine would answer now; else 503 with what to do. Where keys are wanted, why is for their owners."""
        return await _readiness(gateway, request)

    return paths


async def _readiness(gateway: Gateway, request: Request) -> Response:
    """Details name places and versions: they are for who may ask everything else too."""
    known = request.state.caller.known
    try:
        gateway.admission.check()
        detail = await gateway.keeper.ready()
    except ServerError as error:
        return refusal(error, request.state.request_id, None if known else "not ready: ask with an API key to learn why")
    model = gateway.keeper.serving().model
    return JSONResponse({"status": "ready", "model": model, "engine": detail} if known else {"status": "ready"})


async def _whole(request: Request, answer: Answer) -> translate.Whole:
    async def collect() -> translate.Whole:
        await answer.start()
        return translate.whole([event async for event in answer.events()])

    async with answer:
        return await unless_gone(request.receive, collect())


async def _stream(gateway: Gateway, request: Request, answer: Answer, write: Writing) -> Response:
    """Headers go out once the first event is there, so that what fails before is a plain error with its own status; or, for the
    sake of proxies, once nothing came for so long that a comment is due."""
    async with AsyncExitStack() as undo:
        await undo.enter_async_context(answer)
        await unless_gone(request.receive, answer.start(gateway.settings.ping_s))
        undo.pop_all()  # the stream owns the answer from here on
    return EventStream(answer, write, gateway.settings.ping_s, request.state.request_id)
