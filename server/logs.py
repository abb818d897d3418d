"""Lines of the log: each with the id of its request, none with what a client said and none with a key.

A request is one line, written at its end: method, route, status, time, caller, and what note() learnt on the way. Routes are named as
they were declared, never as they were called, since anything may stand in an address.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"(?!tr-)[A-Za-z0-9._-]{1,64}")
"""An id of the client's own that may be kept; a key in its place may not."""

_facts: ContextVar[dict[str, Any] | None] = ContextVar("facts", default=None)


def note(**facts: Any) -> None:
    """Facts for the line of the request under way: numbers and names of ours. Without a request they are nobody's."""
    if (known := _facts.get()) is not None:
        known.update(facts)


class Requests:
    """The outermost middleware: an id for every request, in its state and in the reply's X-Request-ID; its line and its count at its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        id = own if REQUEST_ID.fullmatch(own) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id
        _facts.set({"request_id": id})
        status = 500  # what a bug becomes, outside of here

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        began = time.perf_counter()
        with self._metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                self._end(scope, status, time.perf_counter() - began)

    def _end(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        caller = scope["state"].get("caller")
        name = caller.name if caller else ""
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        self._metrics.requests.labels(path, str(status), name).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        note(method=method, path=path, status=status, seconds=round(seconds, 4), caller=name)
        level = logging.DEBUG if (path, status) == ("/healthz", 200) else logging.INFO  # asked every few seconds, by whoever looks after us
        log.log(level, "%s %s %s", method, path, status, extra={"facts": dict(_facts.get() or {})})


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Formatter(logging.Formatter):
    """Facts behind the message; a traceback without the errors' own texts, which may quote a client."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{record.levelname}: {record.getMessage()}"
        facts = facts_of(record)
        line += "".join(f" {name}={value}" for name, value in facts.items() if name not in SAID and value != "")
        return f"{line}\n{trace_of(record)}" if record.exc_info else line


SAID = frozenset({"method", "path", "status"})
"""Facts that stand in the message already."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        tree = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts_of(record),
        }
        return json.dumps(tree | ({"trace": trace_of(record)} if record.exc_info else {}), ensure_ascii=False, default=str)


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """All facts for a request's own line, its id alone for lines on the way."""
    known = _facts.get() or {}
    facts: dict[str, Any] = getattr(record, "facts", {name: known[name] for name in ("request_id",) if name in known})
    return facts


def trace_of(record: logging.LogRecord) -> str:
    """The frames of an error and of its causes, outermost error first; their texts only outside of requests."""
    error = record.exc_info[1] if record.exc_info else None
    parts: list[str] = []
    while error is not None:
        text = f": {error}" if _facts.get() is None else ""
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"{type(error).__module__}.{type(error).__qualname__}{text}\n{frames}".rstrip())
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(parts)


def configure(format: Literal["text", "json"]) -> None:
    """Of this process, once, at its start."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "uvicorn"):  # they tell of every request in their own way
        logging.getLogger(name).setLevel(logging.WARNING)
