"""Which release this gateway serves: watches what is wanted, has the engine load it, switches, lets the one before finish.

What is wanted stands in the state directory, written by the loader; where nothing was ever loaded it is the releases' own
`current`. A release that is refused never takes the place of one that answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from server import manifest
from server.engines import Engine, Status
from server.errors import MISTAKES, EngineError, NotReady, ReleaseError, ServerError, SetupError
from server.manifest import Release
from server.release.state import Entry, State

log = logging.getLogger(__name__)

PAUSES_S = (2.0, 2.0, 5.0, 10.0, 30.0)
"""Before an engine that failed to load a release is asked again; the last one for ever after."""
LOOK_S = 1.0
"""How old what is told of the engine may be: everybody may ask for it, also without a key."""
MISTAKE = "the server made a mistake when it looked for its release; its log knows more"


@dataclass(frozen=True)
class Live:
    release: Release
    digest: str


class Glance:
    """What the engine says of a release, asked for once in LOOK_S at most: whoever comes meanwhile shares the answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._of: Live | None = None
        self._asking: asyncio.Task[Status] | None = None
        self._began = 0.0

    async def at(self, live: Live) -> Status:
        now = asyncio.get_running_loop().time()
        if self._asking is None or self._of is not live or (self._asking.done() and now - self._began >= LOOK_S):
            self._of, self._began = live, now
            self._asking = asyncio.create_task(self._engine.status(live.release.model))
        return await asyncio.shield(self._asking)  # who hangs up takes nobody else's answer along


class Keeper:
    def __init__(
        self, releases: Path, engine: Engine, state: Path | None = None, poll_s: float = 0.5, *, wait_for_loader: bool = False
    ) -> None:
        self._releases = releases
        self._wait_for_loader = wait_for_loader
        self._engine = engine
        self._state = State(state or releases / "state")
        self._poll_s = poll_s
        self._live: Live | None = None
        self._glance = Glance(engine)
        self._why: Callable[[], ServerError] = lambda: NotReady("the server is starting")
        self._refused = ""
        self._settled: tuple[object, ...] | None = None
        self._failures = 0
        self._not_before = 0.0
        self._mistakes = 0
        self._resting_until = 0.0
        self._ended = False
        self._leases: Counter[str] = Counter()
        self._retired: list[Release] = []
        self._open = asyncio.Event()
        self._open.set()

    def serving(self) -> Release:
        """The release that answers now. Raises NotReady or ReleaseError with what to do."""
        if self._live is None:
            raise self._why()
        return self._live.release

    async def ready(self) -> str:
        """One line about the engine that is ready to answer. Raises like serving(), or NotReady when the engine is not."""
        release, live = self.serving(), self._live
        assert live, "else serving() raises"
        if self._ended:
            raise NotReady(f"{MISTAKE}: start it again")
        status = await self._glance.at(live)
        if not status.ready:
            raise NotReady(status.detail)
        if status.digest != live.digest:
            raise NotReady(
                f"{release.model} was replaced at the engine (it has {status.digest[:19]}, its probes were put to {live.digest[:19]}): "
                "load it again with `python -m server release load`"
            )
        return f"{status.detail}; wanted but not served: {self._refused}" if self._refused else status.detail

    @asynccontextmanager
    async def lease(self) -> AsyncGenerator[Release]:
        """The release for one answer: it stays loaded until the block is left. Waits while a loader needs the engine's only slot.

        Raises like serving().
        """
        if self._state.loading() and not self._ended:  # asked here, since the next look may be too late
            self._open.clear()
        await self._open.wait()
        release = self.serving()
        self._leases[release.model] += 1
        try:
            yield release
        finally:
            self._leases[release.model] -= 1

    async def run(self) -> None:
        """For ever: serve what is wanted."""
        while True:
            try:
                await self._round()
            except MISTAKES as error:
                self._rest(error)
            await asyncio.sleep(self._poll_s)

    async def _round(self) -> None:
        loading = self._state.loading()  # before the look: a loader takes its mark away after it wrote what is wanted
        try:
            if asyncio.get_running_loop().time() >= self._resting_until:
                await self._look()
                self._mistakes = 0
        finally:
            if not loading:
                self._open.set()
        await self._unload_retired()

    def _rest(self, error: Exception) -> None:
        """After a mistake: look again, but not at once; rounds go on, so that nobody waits before a closed gate meanwhile."""
        log.error("looking for releases failed", exc_info=error)
        self._note(NotReady, f"{MISTAKE} and it is tried again")
        self._settled = None
        self._resting_until = asyncio.get_running_loop().time() + PAUSES_S[min(self._mistakes, len(PAUSES_S) - 1)]
        self._mistakes += 1

    def ended(self, running: asyncio.Task[None]) -> None:
        """Done-callback of a task of run(): what not even that survived must not look well, nor close the gate for ever."""
        self._open.set()
        if not running.cancelled() and (error := running.exception()):
            log.error("watching for releases ended", exc_info=error)
            self._ended = True
            self._why = lambda: NotReady(f"{MISTAKE}: start it again")

    async def _look(self) -> None:
        """Bring up what is wanted, unless that was done or refused already. What an engine failed at is tried again."""
        seen = self._state.stamp() or manifest.stamp(self._releases)  # before it is read: what changes meanwhile was not looked at
        now = asyncio.get_running_loop().time()
        if seen == self._settled and now < self._not_before:
            return
        self._not_before, failures = float("inf"), 0
        try:
            await self._serve_wanted()
        except ReleaseError as error:
            self._note(ReleaseError, str(error))
        except (EngineError, SetupError) as error:
            self._note(NotReady, str(error))
            failures = self._failures + 1 if seen == self._settled else 1
            self._not_before = now + PAUSES_S[min(failures, len(PAUSES_S)) - 1]
        self._settled, self._failures = seen, failures

    async def _serve_wanted(self) -> None:
        if wanted := await asyncio.to_thread(self._state.read):
            await self._serve_entry(wanted.live)
        elif not (directory := await asyncio.to_thread(manifest.find, self._releases)):
            self._note(NotReady, no_release(self._releases))
        elif self._wait_for_loader:
            self._note(NotReady, f"{directory.name} waits for the loader, whose log says how far it is")
        else:
            await self._serve(await asyncio.to_thread(manifest.read, directory))

    async def _serve_entry(self, entry: Entry) -> None:
        """Serve what a loader left; an engine that has it already is not asked to load it again."""
        await self._engine.check()  # an engine that is not there must not look like one that lost the model
        status = await self._engine.status(entry.release.model)
        if status.ready and status.digest == entry.digest:
            self._switch(entry.release, entry.digest)
            return
        await self._serve(await asyncio.to_thread(entry.read))

    async def _serve(self, release: Release) -> None:
        if self._live and self._live.release == release:
            return
        if self._live:
            manifest.check_id(self._live.release.manifest, release.manifest)
        loading = f"the engine is loading {release.model}"
        log.info("%s", loading)
        self._why = lambda: NotReady(loading)
        self._switch(release, await self._engine.load(release))

    def _switch(self, release: Release, digest: str) -> None:
        before, self._live = self._live, Live(release, digest)
        self._refused = ""
        if before and before.release.model != release.model:
            self._retired.append(before.release)
        if before != self._live:
            log.info("serving %s", release.model)

    async def _unload_retired(self) -> None:
        """Unload what has given its last answer; a release that came back meanwhile stays."""
        for release in self._retired.copy():
            in_service = self._live is not None and self._live.release.model == release.model
            if self._leases[release.model] and not in_service:
                continue
            self._retired.remove(release)
            if not in_service:
                try:
                    await self._engine.unload(release.model)
                except (EngineError, *MISTAKES) as error:
                    log.warning("%s stays loaded: %s", release.model, error, exc_info=not isinstance(error, EngineError))

    def _note(self, kind: type[ServerError], why: str) -> None:
        """Why what is wanted is not served; what is served stays."""
        if str(self._why()) != why:
            log.warning("%s%s", why, f"; {self._live.release.model} stays in service" if self._live else "")
        self._why = lambda: kind(why)
        self._refused = why if self._live else ""


def first_look(releases: Path, state: Path) -> str | None:
    """What a gateway that starts now will serve, in a line; None: nothing. Raises ReleaseError."""
    if wanted := State(state).read():
        return f"{wanted.live.release.model}, which was loaded from {wanted.live.directory}"
    if directory := manifest.find(releases):
        return f"{manifest.read(directory).model} in {directory}, every file as it was released"
    return None


def no_release(releases: Path) -> str:
    return f"no release yet in {releases}: make one with `make demo` (any laptop) or `make train` (a GPU); it is picked up by itself"
