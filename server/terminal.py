"""`python -m server chat`: a conversation in the terminal with the server of these settings, asked as any client asks it.

Where the server wants a key, one is made and taken back at the end: whoever may write the file of keys may make them anyway.
"""

from __future__ import annotations

import json
import secrets
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO
from urllib.error import HTTPError, URLError

from pydantic_settings import SettingsConfigDict

from server import auth, settings
from server.errors import SetupError
from server.limits import Limits


class ChatCommand(settings.Settings):
    """Talks with the server that runs with these settings on this machine; a line is a turn, an empty one or Ctrl-D ends it."""

    model_config = SettingsConfigDict(cli_prog_name="python -m server chat")

    message: str = ""
    """Ask only this."""


def main(argv: Sequence[str], source: TextIO = sys.stdin) -> int:
    chosen = settings.load_as(ChatCommand, argv)
    turns: list[dict[str, str]] = []
    with key(chosen) as secret:
        for line in [chosen.message] if chosen.message else typed(source):
            turns.append({"role": "user", "content": line})
            answer = ""
            for piece in ask(chosen.port, secret, turns):
                answer += piece
                print(piece, end="", flush=True)
            print()
            turns.append({"role": "assistant", "content": answer})
    return 0


@contextmanager
def key(chosen: settings.Settings) -> Iterator[str]:
    """A key for as long as the block lasts; the empty one where the server asks for none."""
    keys = auth.Keys.open(chosen.keys_file)
    if not len(keys):
        yield ""
        return
    name = f"terminal-{secrets.token_hex(4)}"
    secret = keys.make(name, Limits(chosen.key_requests_per_minute, chosen.key_concurrent))
    try:
        yield secret
    finally:
        keys.remove(name)


def typed(source: TextIO) -> Iterator[str]:
    while True:
        print("> ", end="", flush=True)
        line = source.readline().strip()
        if not line:
            print()
            return
        yield line


def ask(port: int, secret: str, turns: Sequence[dict[str, str]]) -> Iterator[str]:
    """The answer in pieces. Raises SetupError with the server's own words, or because nothing answers."""
    address = f"http://127.0.0.1:{port}"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})
    body = json.dumps({"messages": list(turns), "stream": True}).encode()
    request = urllib.request.Request(f"{address}/chat", body, headers)  # noqa: S310  # http, as it says
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request) as reply:
            yield from pieces(reply)
    except HTTPError as error:
        raise SetupError(f"{address}: {json.load(error)['error']['message']}") from error
    except URLError as error:
        raise SetupError(f"no server answers at {address}: `make up` or `make serve` starts one") from error


def pieces(lines: Iterable[bytes]) -> Iterator[str]:
    """The texts of server-sent events. Raises SetupError for an error among them."""
    for line in lines:
        data = line.removeprefix(b"data: ").strip()
        if data == line.strip() or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise SetupError(event["error"]["message"])
        yield event["delta"].get("content", "")
