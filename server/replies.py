"""HTTP's side of the gateway: reading a JSON body, errors in their one shape, streams that notice a client who left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server import errors, translate
from server.admission import Answer
from server.errors import BadHttp, BadRequest, BodyTooSlow, ClientGone, NoJsonType, NotJson, ServerError, TooLarge
from server.manifest import explain

log = logging.getLogger(__name__)

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")

MISTAKE = "the server made a mistake; its log knows more about this request id"


async def read(request: Request, kind: type[B], max_bytes: int, example: str) -> B:
    """The body as `kind`. Raises NotJson, TooLarge or BadRequest, with the curl line that works or the field that does not.

    Who needs no key must say that it is JSON: a web page cannot without being allowed to. A key is proof enough.
    """
    curl = f"curl -s {request.url} -H 'Content-Type: application/json' -d '{example}'"
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.state.caller.limits is None and content_type != "application/json" and not content_type.endswith("+json"):
        raise NoJsonType(f"the body must be sent as JSON, not as {content_type or 'nothing in particular'}; this works: {curl}")
    content = await _bytes(request, max_bytes)
    try:
        return kind.model_validate_json(content)  # not json.loads: it lets lone surrogates in, and falls over deep nesting
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise NotJson(f"the body is not valid JSON ({first['ctx']['error']}); this works: {curl}") from error
        if first["type"] == "model_type" and not first["loc"]:
            raise NotJson(f"the body must be a JSON object; this works: {curl}") from error
        raise BadRequest(explain(error)) from error


async def _bytes(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise TooLarge(f"the body is larger than {max_bytes} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise ClientGone("the client hung up before its body was whole") from None
    return b"".join(parts)


def refusal(error: ServerError, request_id: str, message: str | None = None) -> Response:
    """An error's reply, with its own message or another."""
    row = errors.shown(error)
    retry_after_s = getattr(error, "retry_after_s", row.retry_after_s)
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    if row.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BadHttp | BodyTooSlow):
        headers["Connection"] = "close"
    return JSONResponse(errors.body(message or str(error), row, request_id), row.status, headers)


async def on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return refusal(error, request.state.request_id)


async def on_bug(request: Request, error: Exception) -> Response:
    """Our own mistakes: the log gets the frames, the client nothing of it. Runs outside of logs.Requests, hence the header."""
    id = request.state.request_id
    log.error("a bug: the frames follow")
    return JSONResponse(errors.body(MISTAKE, errors.BUG, id), errors.BUG.status, {"X-Request-ID": id})


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown paths and methods."""
    status = getattr(error, "status_code", 500)
    row = errors.Shown(status, "invalid_request_error", {404: "not_found", 405: "method_not_allowed"}.get(status, "http_error"))
    message = (
        f"{request.method} {request.url.path}: {getattr(error, 'detail', 'failed')}; there are POST /chat and POST /v1/chat/completions"
    )
    return JSONResponse(errors.body(message, row, request.state.request_id), status, getattr(error, "headers", None))


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up (ClientGone). The body must have been read.

    `work` runs in the caller's own task: another one would cost the first token its way through the loop, twice.
    """
    try:
        async with asyncio.timeout(None) as limit:
            watching = asyncio.create_task(_watch(receive, limit))
            try:
                return await work
            finally:
                watching.cancel()  # it does nothing any more, so that the block can be left
    except (ServerError, *errors.MISTAKES) as error:  # the TimeoutError, or what a clean-up raised; nobody reads it any more
        if limit.expired():
            raise ClientGone("the client hung up") from error
        raise


async def _watch(receive: Receive, limit: asyncio.Timeout) -> None:
    """Let `limit` expire when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    limit.reschedule(0)


Writing = Callable[[], tuple[str, translate.Writer]]
"""Called at the first event: a stream's opening text and what writes its events."""


class EventStream(Response):
    """Server-sent events of an answer that has started. Owns the answer: closes it at the end, on an error, or when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, write: Writing, ping_s: float, request_id: str) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._write = write
        self._ping_s = ping_s
        self._request_id = request_id
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answer:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_gone(receive, self._send_all(send))
            except ClientGone:
                return

    async def _send_all(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._sent_at = clock()
        pinging = asyncio.create_task(self._ping(send))
        try:
            async with aclosing(self._texts()) as texts:
                async for text in texts:
                    self._sent_at = clock()
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _texts(self) -> AsyncGenerator[str]:
        """The stream's text; an error in the middle becomes an event of its own, without a [DONE] after it."""
        write: translate.Writer | None = None
        try:
            async with aclosing(self._answer.events()) as events:
                async for event in events:
                    opening = ""
                    if write is None:
                        opening, write = self._write()
                    yield opening + write(event)
        except ServerError as error:
            yield translate.sse(errors.body(str(error), errors.shown(error), self._request_id))
        except errors.MISTAKES as error:  # it has no status for them any more
            log.exception("a bug: the frames follow")
            self._answer.blame(error)
            yield translate.sse(errors.body(MISTAKE, errors.BUG, self._request_id))

    async def _ping(self, send: Send) -> None:
        """For ever: a comment after `ping_s` without a text. A task of its own, so that each event does not cost one."""
        clock = asyncio.get_running_loop().time
        while True:
            silent_s = clock() - self._sent_at
            if silent_s < self._ping_s:
                await asyncio.sleep(self._ping_s - silent_s)
                continue
            self._sent_at = clock()
            await send({"type": "http.response.body", "body": translate.PING.encode(), "more_body": True})
