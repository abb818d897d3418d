"""The port: binding it, uvicorn with bounds for its connections, and the way it stops.

uvicorn waits for ever for the rest of a request's headers, and for whoever does not read what was written for them. So its
protocol gets clocks here; a body's clock is a middleware (server/limits.py), which can still answer.
"""

from __future__ import annotations

import asyncio
import errno
import json
import resource
import socket
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from types import FrameType
from typing import ClassVar

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from server import errors
from server.admission import Admission
from server.errors import BadHttp, SetupError, Shown
from server.settings import Settings

FAREWELL_S = 3
"""How long replies that are no answers of the engine may take once those have ended."""
BAD_HTTP = errors.TABLE[BadHttp]
TOO_MANY = Shown(503, "overloaded_error", "too_many_connections", 2)


@dataclass(frozen=True, slots=True)
class Bounds:
    header_timeout_s: float
    """From a connection's start, or a request's first byte, to the end of its headers."""
    read_timeout_s: float
    """How long what was written may wait for its reader, once the system's own buffers are full."""
    max_connections: int


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with clocks and a bound. Whoever is too slow is cut off; what is no HTTP is refused in the one shape of errors."""

    bounds: ClassVar[Bounds]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._clocks: dict[str, asyncio.TimerHandle] = {}
        if len(self.connections) > self.bounds.max_connections:
            transport.write(_raw(TOO_MANY, "too many connections: try again in a moment"))
            transport.close()
        self._start("headers", self.bounds.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("headers")
        else:
            self._start("headers", self.bounds.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._clocks):
            self._stop(name)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("reader", self.bounds.read_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reader")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start("reader", self.bounds.read_timeout_s)  # the last of an answer may still wait for its reader

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_raw(BAD_HTTP, "this is not HTTP/1.1 as it is written down"))
        self.transport.close()

    def abort_if_unread(self) -> None:
        if "reader" in self._clocks:
            self.transport.abort()

    def _start(self, name: str, seconds: float) -> None:
        """A clock that runs already goes on: a byte now and then does not turn it back."""
        if name not in self._clocks:
            self._clocks[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        if clock := self._clocks.pop(name, None):
            clock.cancel()


def protocol(bounds: Bounds) -> type[Protocol]:
    """The class that uvicorn wants, which makes its instances itself."""
    return type("BoundedProtocol", (Protocol,), {"bounds": bounds})


def _raw(row: Shown, message: str) -> bytes:
    """A whole reply for who has no request of their own yet."""
    id = uuid.uuid4().hex
    body = json.dumps(errors.body(message, row, id)).encode()
    head = f"HTTP/1.1 {row.status} {HTTPStatus(row.status).phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nX-Request-ID: {id}\r\n"
    retry = f"Retry-After: {row.retry_after_s}\r\n" if row.retry_after_s else ""
    return f"{head}{retry}Connection: close\r\n\r\n".encode() + body


class Server(uvicorn.Server):
    """Asked to stop, it first lets answers end, still listening, so that /readyz can say so; a second Ctrl-C ends them."""

    def __init__(self, config: uvicorn.Config, admission: Admission, drain_s: float) -> None:
        super().__init__(config)
        self._admission = admission
        self._drain_s = drain_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._admission.drain(self._drain_s)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Protocol):
                connection.abort_if_unread()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit and self._loop:
            self._loop.call_soon_threadsafe(self._admission.cut)


def make_server(app: FastAPI, chosen: Settings) -> Server:
    """For an application of create_app(); it wants its sockets from listen()."""
    config = uvicorn.Config(
        app,
        http=protocol(Bounds(chosen.header_timeout_s, chosen.stall_timeout_s, chosen.max_connections)),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=FAREWELL_S,
    )
    return Server(config, app.state.admission, chosen.drain_s)


def allow_connections(number: int) -> None:
    """Let this process open so many, each with one to the engine; a shell's usual limit is 1024 files. What root forbids stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * number + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything is loaded, so that a taken port is said at once. Raises SetupError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:  # the latter for what cannot even be a name
        raise SetupError(f"--host {host}: no such address ({error})") from error
    listener = socket.socket(family, kind, proto)  # unless it says TCP by itself, asyncio leaves Nagle's 40 ms on
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SetupError(f"port {port} is taken: stop the other program, or choose another with --port or TRINITY_PORT") from error
        raise SetupError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
