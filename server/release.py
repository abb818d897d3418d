"""Which release is served: policy only. Waits for one to appear, has the engine load it, knows why nothing is served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server import manifest
from server.engines import Engine
from server.errors import EngineError, NotReady, ReleaseError, ServerError
from server.manifest import Release

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Live:
    release: Release
    digest: str


class Keeper:
    def __init__(self, releases: Path, engine: Engine, poll_s: float = 2.0) -> None:
        self._releases = releases
        self._engine = engine
        self._poll_s = poll_s
        self._live: Live | None = None
        self._why: Callable[[], ServerError] = lambda: NotReady("the server is starting")

    def serving(self) -> Release:
        """The release that answers now. Raises NotReady or ReleaseError with what to do."""
        if self._live is None:
            raise self._why()
        return self._live.release

    async def ready(self) -> str:
        """One line about the engine that is ready to answer. Raises like serving(), or NotReady when the engine is not."""
        release = self.serving()
        status = await self._engine.status(release.model)
        if not status.ready or (self._live and status.digest != self._live.digest):
            raise NotReady(status.detail)
        return status.detail

    async def bring_up(self) -> None:
        """Until a release is served: look for one, read it, load it. A refused one is tried again once its files, or the link, change."""
        refused: tuple[object, ...] | None = None
        while self._live is None:
            seen = manifest.stamp(self._releases)  # before it is read: what changes during a long load was not refused
            try:
                directory = manifest.find(self._releases)
                if directory is None:
                    self._note(NotReady, no_release(self._releases))
                elif seen != refused:
                    await self._load(directory)
            except ReleaseError as error:
                refused = seen
                self._note(ReleaseError, str(error))
            except EngineError as error:
                self._note(NotReady, str(error))
            if self._live is None:
                await asyncio.sleep(self._poll_s)

    def ended(self, bringing_up: asyncio.Task[None]) -> None:
        """Done-callback of a task of bring_up(): without it a bug of ours would leave a server that is loading for ever."""
        if not bringing_up.cancelled() and (error := bringing_up.exception()):
            log.error("bringing up a release failed", exc_info=error)
            self._why = lambda: NotReady("the server made a mistake when it brought up its release: its log knows more; start it again")

    async def _load(self, directory: Path) -> None:
        release = await asyncio.to_thread(manifest.read, directory)
        loading = f"the engine is loading {release.model}"
        log.info("%s", loading)
        self._why = lambda: NotReady(loading)
        digest = await self._engine.load(release)
        self._live = Live(release, digest)
        log.info("serving %s", release.model)

    def _note(self, kind: type[ServerError], why: str) -> None:
        if str(self._why()) != why:
            log.warning("%s", why)
        self._why = lambda: kind(why)


def no_release(releases: Path) -> str:
    return f"no release yet in {releases}: make one with `make demo` (any laptop) or `make train` (a GPU); it is picked up by itself"
