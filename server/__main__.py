"""`python -m server`: checks what can be checked before a request comes, then serves. What you can mend is one line and exit code 2."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn

from server import manifest, settings
from server.app import create_app, make_engine
from server.errors import SetupError
from server.release import no_release

GRACE_S = 30
"""How long answers under way may take when the server is asked to stop."""


def main(argv: Sequence[str]) -> int:
    try:
        return run(settings.load(argv))
    except SetupError as error:
        print(f"server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(chosen: settings.Settings) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains first, then raises the signal again
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    listener = listen(chosen.host, chosen.port)
    with listener:
        directory = manifest.find(chosen.releases)
        if directory is None:
            print(f"server: {no_release(chosen.releases)}", file=sys.stderr)
        else:
            manifest.read(directory)
        asyncio.run(serve(chosen, listener))
    return 0


async def serve(chosen: settings.Settings, listener: socket.socket) -> None:
    engine = make_engine(chosen)
    try:
        await engine.check()
    except SetupError:
        await engine.close()
        raise
    config = uvicorn.Config(create_app(chosen, engine), log_config=None, server_header=False, timeout_graceful_shutdown=GRACE_S)
    host, port = listener.getsockname()[:2]
    print(f"server: http://{f'[{host}]' if ':' in host else host}:{port}/chat with engine {chosen.engine}", file=sys.stderr, flush=True)
    await uvicorn.Server(config).serve(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything is loaded, so that a taken port is said at once. Raises SetupError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:  # the latter for what cannot even be a name
        raise SetupError(f"--host {host}: no such address ({error})") from error
    listener = socket.socket(family, kind)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
