"""Who may ask: API keys, of which only hashes are kept, and the Guard before every path.

A key opens everything but the paths in OPEN, which show nothing of anybody's. On the loopback a server without keys asks for
none; then the Host header must be the loopback's or a listed name, so that no web page reaches it by a name of its own (DNS
rebinding), and replies.read wants JSON's content type, which no web page can send without being allowed to.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import BadHttp, ForbiddenHost, ServerError, SetupError, Unauthorized
from server.limits import Limiter, Limits
from server.manifest import explain
from server.replies import refusal

log = logging.getLogger(__name__)

FORWARDED = frozenset(
    {"forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-server", "x-real-ip"}
)
"""Headers that only proxies write."""
OPEN = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json"})
"""Paths without a key: a browser cannot send one with the address it opens, and they are the same for everybody."""
PREFIX = "tr-"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is; no limits for whoever needs no key."""

    name: str
    limits: Limits | None
    known: bool = True
    """False on an open path for who would get no further: nothing is told that is not for everybody."""


LOCAL = Caller("", None)
STRANGER = Caller("", None, known=False)


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._@-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: datetime
    requests_per_minute: int = Field(ge=1)
    concurrent: int = Field(ge=1)

    @property
    def caller(self) -> Caller:
        return Caller(self.name, Limits(self.requests_per_minute, self.concurrent))


class KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Record, ...] = ()


class Keys:
    """The keys of one file, which is read again whenever it was replaced. Without the file there are none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: tuple[Record, ...] = ()
        self._seen: tuple[int, ...] | None = None

    @classmethod
    def open(cls, path: Path) -> Keys:
        """Raises SetupError when the file is there and is no file of keys."""
        keys = cls(path)
        keys._seen = _stamp(path)  # before it is read: a change in between is then seen later, not never
        keys._records = _read(path)
        return keys

    def __len__(self) -> int:
        self._refresh()
        return len(self._records)

    def check(self, secret: str) -> Caller | None:
        """Whose key it is. The time tells nothing about the keys: the hash is compared with every one, to its end."""
        self._refresh()
        digest = _digest(secret)
        found = None
        for record in self._records:
            if hmac.compare_digest(record.sha256, digest):
                found = record
        return found.caller if found else None

    def make(self, name: str, limits: Limits) -> str:
        """A new key, whose only copy is what this returns. Raises SetupError: the name is taken or cannot be, or nothing can be written."""
        secret = PREFIX + secrets.token_urlsafe(32)
        with self._changing():
            if any(record.name == name for record in self._records):
                raise SetupError(f"{self.path}: there is a key named {name} already: choose another --name, or --remove it first")
            try:
                record = Record(
                    name=name,
                    sha256=_digest(secret),
                    created=datetime.now(UTC),
                    requests_per_minute=limits.requests_per_minute,
                    concurrent=limits.concurrent,
                )
            except ValidationError as error:
                raise SetupError(f"a key cannot be made like this: {explain(error)}") from error
            self._write((*self._records, record))
        return secret

    def remove(self, name: str) -> None:
        with self._changing():
            kept = tuple(record for record in self._records if record.name != name)
            if len(kept) == len(self._records):
                raise SetupError(f"{self.path}: there is no key named {name}, but: {', '.join(self.names) or 'none at all'}")
            self._write(kept)

    @property
    def names(self) -> list[str]:
        return [record.name for record in self._records]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One writer at a time, who starts from what is there now."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._records = _read(self.path)
                yield
        except OSError as error:
            raise SetupError(
                f"{self.path}: keys cannot be kept there ({error.strerror}): name a file that can be written with --keys"
            ) from error

    def _write(self, records: tuple[Record, ...]) -> None:
        draft = self.path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(KeysFile(keys=records).model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        self._records, self._seen = records, _stamp(self.path)

    def _refresh(self) -> None:
        seen = _stamp(self.path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._records = _read(self.path)
        except SetupError as error:
            log.warning("%s; the keys read before stay", error)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> tuple[Record, ...]:
    try:
        return KeysFile.model_validate(json.loads(path.read_text(encoding="utf-8"))).keys
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise SetupError(f"{path}: {explain(error)}: mend it, or move it away and make new keys with `make key`") from error
    except ValueError as error:
        raise SetupError(f"{path}: no JSON ({error}): mend it, or move it away and make new keys with `make key`") from error


def _digest(secret: str) -> str:
    """sha256 alone: the secrets are 256 random bits, which no dictionary holds."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def is_loopback(host: str) -> bool:
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in ("localhost", "localhost.")


class Guard:
    """The middleware that lets a request through as a Caller, in scope["state"]["caller"], or refuses it."""

    def __init__(self, app: ASGIApp, keys: Keys, limiter: Limiter, *, local: bool, allowed_hosts: Collection[str]) -> None:
        """`local`: only this machine can reach the server, so that it may do without keys."""
        self.app = app
        self._keys = keys
        self._limiter = limiter
        self._local = local
        self._allowed_hosts = frozenset(name.lower() for name in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["caller"] = LOCAL
        try:
            caller = state["caller"] = self._caller(scope)
            # Looking is free; what costs the engine's time is posted.
            place = self._limiter.place(caller.name, caller.limits if scope["method"] == "POST" else None)
        except ServerError as error:
            await refusal(error, state["request_id"])(scope, receive, send)
            return
        with place:
            await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        """Raises BadHttp, ForbiddenHost or Unauthorized."""
        headers = scope["headers"]
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            raise BadHttp("Content-Length and Transfer-Encoding in one request: a proxy could see its end elsewhere than this server")
        try:
            return self._known(headers)
        except (ForbiddenHost, Unauthorized):
            if scope["path"] in OPEN:
                return STRANGER
            raise

    def _known(self, headers: Sequence[tuple[bytes, bytes]]) -> Caller:
        """Raises ForbiddenHost or Unauthorized."""
        if self._local and not len(self._keys):
            self._check_local(headers)
            return LOCAL
        given = [value.decode("latin-1") for name, value in headers if name == b"authorization"]
        scheme, _, secret = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        caller = self._keys.check(secret.strip()) if scheme.lower() == "bearer" else None
        if caller is None:
            raise Unauthorized(
                ("this key is not known here" if given else "this server wants an API key")
                + ": send it as `Authorization: Bearer KEY`; whoever runs the server makes one with `make key`"
            )
        return caller

    def _check_local(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """A proxy on this machine brings the world with it, and nginx calls this server by a name of the loopback."""
        if passed := sorted({name.decode("latin-1") for name, _ in headers} & FORWARDED):
            raise ForbiddenHost(
                f"this server has no key and answers only to this machine, but a proxy stands before it ({', '.join(passed)}): make a key "
                "with `make key`"
            )
        self._check_host([value.decode("latin-1") for name, value in headers if name == b"host"])

    def _check_host(self, given: list[str]) -> None:
        host = given[0] if len(given) == 1 else ""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if not is_loopback(name) and name.lower() not in self._allowed_hosts:
            raise ForbiddenHost(
                "this server has no key and answers only to names of the loopback (localhost, 127.0.0.1): "
                "list this Host in --allowed-hosts, or make a key with `make key`"
            )
