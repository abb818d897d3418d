"""`python -m server`: checks what can be checked before a request comes, then serves. What you can mend is one line and exit code 2.

`python -m server check` does only the first half; `key`, `release` and `chat` work beside a server that runs.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from server import auth, logs, manifest, settings
from server.app import create_app, make_engine
from server.errors import ServerError, SetupError
from server.limits import Limits
from server.port import allow_connections, listen, make_server
from server.release import first_look, no_release


def main(argv: Sequence[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("serve", argv)
    try:
        return COMMANDS[name](rest)
    except SetupError as error:
        print(f"server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(argv: Sequence[str]) -> int:
    chosen = settings.load(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains first, then raises the signal again
    logs.configure(chosen.log_format)
    allow_connections(chosen.max_connections)
    with listen(chosen.host, chosen.port) as listener:
        # A look reads every byte of a release; where a loader does that, nobody waits for it here, and the log says what is missing.
        if not chosen.wait_for_loader and first_look(chosen.releases, chosen.state) is None:
            print(f"server: {no_release(chosen.releases)}", file=sys.stderr)
        asyncio.run(_serve(chosen, listener))
    return 0


def first_key(chosen: settings.Settings, address: str) -> None:
    """Whoever can be reached from elsewhere has a key: without any the first is made, and shown this once."""
    keys = auth.Keys.open(chosen.keys_file)
    if auth.is_loopback(chosen.host) or len(keys):
        return
    try:
        secret = keys.make("first", _limits(chosen))
    except SetupError:
        if len(keys):  # a copy of this server that starts at the same moment was faster, and shows it
            return
        raise
    print(
        f"server: made the first API key, shown only now: {secret}\nserver: chat page: {address}/#key={secret}", file=sys.stderr, flush=True
    )


async def _serve(chosen: settings.Settings, listener: socket.socket) -> None:
    engine = make_engine(chosen)
    try:
        await engine.check()
        first_key(chosen, _address(chosen.host, listener))
        app = create_app(chosen, engine)
    except SetupError:
        await engine.close()
        raise
    for licence in manifest.terms(chosen.releases):
        print(f"server: the model is under the {licence}", file=sys.stderr)
    host, port = listener.getsockname()[:2]
    print(f"server: http://{f'[{host}]' if ':' in host else host}:{port}/chat with engine {chosen.engine}", file=sys.stderr, flush=True)
    await make_server(app, chosen).serve(sockets=[listener])


def key(argv: Sequence[str]) -> int:
    """Make a key and print it, alone on stdout; or remove one."""
    chosen = settings.load_as(settings.KeyCommand, argv)
    keys = auth.Keys.open(chosen.keys_file)
    if chosen.remove:
        keys.remove(chosen.remove)
        print(f"server: {chosen.keys_file}: removed {chosen.remove}", file=sys.stderr)
        return 0
    free = next(name for number in count(1) if (name := f"key-{number}") not in keys.names)
    print(keys.make(chosen.name or free, _limits(chosen)))
    return 0


def check(argv: Sequence[str]) -> int:
    """One line each for settings, keys, release and engine; 2 if any of them would keep the server from answering."""
    chosen = settings.load(argv)
    looks: Mapping[str, Callable[[], str]] = {
        "keys": lambda: _check_keys(chosen),
        "release": lambda: _check_release(chosen),
        "engine": lambda: asyncio.run(_check_engine(chosen)),
    }
    print(f"ok      settings: {f'{chosen.config} and ' if chosen.config else ''}flags and environment")
    failed = False
    for name, look in looks.items():
        try:
            print(f"ok      {name}: {look()}")
        except ServerError as error:
            failed = True
            print(f"PROBLEM {name}: {error}")
    return 2 if failed else 0


def _check_keys(chosen: settings.Settings) -> str:
    keys = auth.Keys.open(chosen.keys_file)
    if len(keys):
        return f"{len(keys)} in {chosen.keys_file}: {', '.join(keys.names)}"
    if auth.is_loopback(chosen.host):
        return f"none in {chosen.keys_file}; {chosen.host} asks for none"
    return f"none in {chosen.keys_file}; the first start on {chosen.host} makes one"


def _check_release(chosen: settings.Settings) -> str:
    found = first_look(chosen.releases, chosen.state)
    if found is None:
        raise SetupError(no_release(chosen.releases))
    return found


def release(argv: Sequence[str]) -> int:
    from server.release import cli

    return cli.main(argv)


def chat(argv: Sequence[str]) -> int:
    from server import terminal

    return terminal.main(argv)


async def _check_engine(chosen: settings.Settings) -> str:
    engine = make_engine(chosen)
    try:
        await engine.check()
    finally:
        await engine.close()
    return f"{chosen.engine} is there"


def _limits(chosen: settings.Settings) -> Limits:
    return Limits(chosen.key_requests_per_minute, chosen.key_concurrent)


def _address(host: str, listener: socket.socket) -> str:
    """What a browser on this machine calls it by."""
    bound, port = listener.getsockname()[:2]
    name = "localhost" if ipaddress.ip_address(bound).is_unspecified else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "check": check,
    "key": key,
    "release": release,
    "chat": chat,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
