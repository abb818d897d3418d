"""Every error that the gateway shows to somebody, and one table that says how: in replies and in streams alike.

A SetupError is for the person who starts the server: one clear line, exit code 2. All others are for the client that
sent a request and carry the shape `{"error": {"message", "type", "code", "request_id"}}`. Anything else is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class ServerError(Exception):
    """Root of the tree; the text is the message that is shown."""


class SetupError(ServerError):
    """The server cannot start like this: port taken, engine not there, impossible setting. Exit code 2."""


class ReleaseError(SetupError):
    """A release that must not be served: broken or unknown manifest, other bytes than released, probes not met."""


class NoRoom(ReleaseError):
    """A release that is well and does not fit, on disk or in memory: once there is room it will."""


class BadRequest(ServerError):
    """The client can mend it; the message names the field."""


class BadHttp(BadRequest):
    """What came is no HTTP, or two servers could read it in two ways."""


class NotJson(BadRequest):
    """The body is no JSON."""


class NoJsonType(NotJson):
    """The body was not sent as JSON: curl says application/x-www-form-urlencoded unless told otherwise."""


class TooLarge(BadRequest):
    """The body has more bytes than the server reads."""


class UnknownModel(BadRequest):
    """The request names a model that is not served here."""


class PromptTooLong(BadRequest):
    """The rendered prompt leaves no room in the model's context. `num_tokens` against `num_ctx`, both tokens."""

    def __init__(self, num_tokens: int, num_ctx: int) -> None:
        super().__init__(
            f"the conversation is {num_tokens} tokens long and the model's context holds {num_ctx}, answer included: "
            "shorten it or leave out the oldest turns"
        )
        self.num_tokens = num_tokens
        self.num_ctx = num_ctx


class Busy(ServerError):
    """All slots are taken and so is the waiting room."""


class QueueTimeout(Busy):
    """No slot came free in time."""


class TooManyRequests(ServerError):
    """A key asks for more than its limits. `retry_after_s`: when it may ask again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Busy):
    """The server was asked to stop: it finishes what it has and takes nothing new."""


class Unauthorized(ServerError):
    """No key, or one that is not known here."""


class ForbiddenHost(ServerError):
    """Called by a name that is not this server's, which a web page can bring about (DNS rebinding)."""


class BodyTooSlow(BadRequest):
    """The body did not come in time."""


class AnswerTooLong(ServerError):
    """The answer took longer than any answer may."""


class ClientTooSlow(ServerError):
    """The client does not read what it asked for; nobody gets this one."""


class NotReady(ServerError):
    """Nothing is served yet: no release, or the engine is still loading it."""


class EngineError(ServerError):
    """The engine failed, or broke off in the middle of an answer."""


class EngineStalled(EngineError):
    """The engine said nothing for longer than it is allowed to."""


class ClientGone(ServerError):
    """The client hung up; nobody reads this answer."""


MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a bug of ours, or a disk that fails, raises, for those few who must go on or say so all the same."""


class Shown(NamedTuple):
    """How an error looks to a client."""

    status: int
    type: str
    code: str
    retry_after_s: int | None = None


TABLE: Mapping[type[Exception], Shown] = {
    BadRequest: Shown(400, "invalid_request_error", "bad_request"),
    BadHttp: Shown(400, "invalid_request_error", "bad_http"),
    NotJson: Shown(400, "invalid_request_error", "not_json"),
    NoJsonType: Shown(415, "invalid_request_error", "no_json_type"),
    TooLarge: Shown(413, "invalid_request_error", "body_too_large"),
    UnknownModel: Shown(404, "invalid_request_error", "model_not_found"),
    PromptTooLong: Shown(400, "invalid_request_error", "context_length_exceeded"),
    Busy: Shown(503, "overloaded_error", "queue_full", 2),
    QueueTimeout: Shown(504, "overloaded_error", "queue_timeout", 5),
    TooManyRequests: Shown(429, "rate_limit_error", "too_many_requests", 1),
    Draining: Shown(503, "unavailable_error", "draining", 5),
    Unauthorized: Shown(401, "authentication_error", "unauthorized"),
    ForbiddenHost: Shown(421, "invalid_request_error", "forbidden_host"),
    BodyTooSlow: Shown(408, "invalid_request_error", "body_too_slow"),
    AnswerTooLong: Shown(504, "engine_error", "answer_too_long"),
    ClientTooSlow: Shown(499, "client_error", "client_too_slow"),
    NotReady: Shown(503, "unavailable_error", "not_ready", 5),
    EngineError: Shown(502, "engine_error", "engine_failed", 2),
    EngineStalled: Shown(504, "engine_error", "engine_stalled", 5),
    ReleaseError: Shown(503, "unavailable_error", "release_refused"),
    ClientGone: Shown(499, "client_error", "client_gone"),
}
"""The nearest class in an error's ancestry decides."""

BUG = Shown(500, "internal_error", "internal_error")


def shown(error: Exception) -> Shown:
    """Status, type, code and Retry-After of an error; what is not in the table is our bug."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), BUG)


def body(message: str, row: Shown, request_id: str) -> dict[str, Any]:
    """The one shape of an error."""
    return {"error": {"message": message, "type": row.type, "code": row.code, "request_id": request_id}}
