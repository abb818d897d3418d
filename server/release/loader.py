"""Brings a release to the engine and then says that it is wanted. Nothing that answers is touched before all of that went well.

The order is the safety: look at disk and memory, unpack, hash, send the bytes, create the model under a name of its own, put
its probes to it, write release.json, and only then tidy up. A kill between any two steps leaves what was wanted before; the
same command run again goes on from what is there.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

from server import manifest
from server.engines import Engine
from server.engines.probes import NUM_PROBES
from server.errors import EngineError, NoRoom, ReleaseError, SetupError
from server.manifest import Manifest, Release
from server.release import archive, space
from server.release.keeper import PAUSES_S, no_release
from server.release.state import Entry, State, Wanted
from server.settings import LOOPBACK, Settings

BEAT_S = 1.0
"""How often the mark for waiting gateways is renewed, and a lock tried again."""
WATCH_S = 5.0


class Host(Engine, Protocol):
    """An engine into which releases are loaded."""

    async def lacks(self, release: Release) -> int:
        """Bytes of the release's files that the engine has not got yet."""

    async def place(self, release: Release) -> None:
        """Bring those to the engine; what answers is not disturbed, and no model's memory needed. Idempotent."""

    async def held_bytes(self) -> int:
        """Memory beside a graphics card's that loaded models take there."""

    async def prune(self, name: str, keep: Collection[str]) -> list[str]:
        """Delete models NAME:RELEASE that are not in `keep` and return them; NAME:latest and names of other kinds stay."""


class Loader:
    def __init__(self, settings: Settings, host: Host, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._host = host
        self._say = say
        self._state = State(settings.state)
        self._unpacked = settings.state.absolute() / "releases"

    async def load(self, source: Path | None = None) -> Wanted:
        """Load `source` (a release, its archive, or a directory of them), else what lies in the setting `releases`.

        Raises ReleaseError, EngineError or SetupError; what was wanted before is then still wanted.
        """
        async with self._turn():
            await self._host.check()
            source = source or self._settings.releases
            found = await asyncio.to_thread(archive.find, source)
            if found is None:
                raise ReleaseError(no_release(source))
            if before := self._state.read():
                manifest.check_id(before.live.manifest, found.manifest)  # before anything is unpacked over what answers
            return await self._activate(await self._read(found), rolled_back="")

    async def rollback(self) -> Wanted:
        """Go back to the release before this one; a second time comes back. Raises like load()."""
        async with self._turn():
            await self._host.check()
            wanted = self._state.read()
            if wanted is None or wanted.previous is None:
                raise ReleaseError(f"{self._state.path} names no release before this one: there is nothing to go back to")
            return await self._activate(await asyncio.to_thread(_kept, wanted.previous), rolled_back=wanted.live.manifest.release)

    async def watch(self, source: Path | None = None, poll_s: float = WATCH_S) -> None:
        """For ever: load what is new there, but for what a rollback left. Looked at once: as long as nothing changes there."""
        source = source or self._settings.releases
        settled: tuple[object, ...] | None = None
        failures = 0
        while True:
            seen = await asyncio.to_thread(manifest.stamp, source)
            if seen != settled:
                try:
                    await self._load_new(source)
                    settled, failures = seen, 0
                except (EngineError, SetupError) as error:
                    if isinstance(error, ReleaseError) and not isinstance(error, NoRoom):
                        settled = seen
                        self._say(f"not loaded: {error}")
                    else:
                        self._say(f"not loaded, and tried again: {error}")
                        await asyncio.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)])
                        failures += 1
            await asyncio.sleep(poll_s)

    async def _load_new(self, source: Path) -> None:
        found = await asyncio.to_thread(archive.find, source)
        wanted = self._state.read()
        left = {wanted.live.manifest.release, wanted.rolled_back} if wanted and wanted.engine == self._settings.engine else set()
        if found and found.manifest.release not in left:
            await self.load(found.path)
        elif wanted:
            self._say(f"{wanted.live.release.model} is wanted, nothing newer is to be loaded")
        else:
            self._say(no_release(source))

    async def _read(self, found: archive.Found) -> Release:
        """The release with every byte checked; whether the disks have room for it is asked before an archive is unpacked."""
        draft = Release(found.path, found.manifest, ())
        packed = archive.is_archive(found.path)
        kept = await asyncio.to_thread(_intact, self._unpacked / found.manifest.release, found.manifest) if packed else None
        size = sum(file.num_bytes for file in found.manifest.files.values())
        writes = [space.Written("unpacked", self._unpacked, size)] if packed and not kept else []
        if store := self._settings.ollama_store if self._settings.engine == "ollama" else None:
            writes.append(space.Written("Ollama's copy", store, await self._host.lacks(draft)))
        space.check_disk(draft.model, writes)
        if kept:
            return kept
        if not packed:
            return await asyncio.to_thread(manifest.read, found.path.resolve())
        self._say(f"unpacking {found.path}")
        folder = await asyncio.to_thread(archive.unpack, found.path, self._unpacked)
        try:
            return await asyncio.to_thread(manifest.read, folder)
        except ReleaseError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ReleaseError(f"{found.path}, unpacked: {error}") from error

    async def _activate(self, release: Release, rolled_back: str) -> Wanted:
        before = self._state.read()
        if before and before.engine != self._settings.engine:
            before = None  # its digests say nothing here
        if before and before.live.manifest == release.manifest and await self._answers(before.live):
            self._say(f"{release.model} is loaded already")
            await self._tidy(before)
            return before
        await self._check_memory(release)
        self._say(f"loading {release.model}")
        await self._host.place(release)
        async with self._alone():
            digest = await self._host.load(release)
            if self._settings.engine == "embedded":  # each gateway has a child of its own, and starts it once this is wanted
                await self._host.unload(release.model)
            live = Entry(directory=release.directory, digest=digest, manifest=release.manifest, probes=release.probes[:NUM_PROBES])
            wanted = Wanted(engine=self._settings.engine, live=live, previous=_other(before, release), rolled_back=rolled_back)
            self._state.write(wanted)
        device = (await self._host.status(release.model)).device
        self._say(f"{release.model} is wanted from now on{f', on the {device.upper()}' if device else ''}")
        await self._tidy(wanted)
        return wanted

    async def _answers(self, entry: Entry) -> bool:
        """Whether the engine still holds it as it was loaded. The embedded engine's model is its gateway's own: that is not seen here."""
        status = await self._host.status(entry.release.model)
        return status.ready and status.digest == entry.digest

    async def _check_memory(self, release: Release) -> None:
        lacking = await self._host.lacks(release)
        if lacking and not release.gguf.is_file():
            raise ReleaseError(f"{release.model}: {release.gguf} is gone and the engine no longer has it: load it from where it is kept")
        if not lacking and not release.gguf.is_file():
            return  # the engine had it once, so that it fitted
        settings, held = self._settings, await self._host.held_bytes()
        goes = held if settings.engine_models == 1 else 0  # the model before makes room for it
        limits = [settings.engine_memory_bytes - held] if settings.engine_memory_bytes else []
        if settings.engine == "embedded" or settings.engine_here or settings.ollama_url.host in LOOPBACK:
            limits.append(space.machine_memory())
        available = min(limits) + goes if limits else None
        await asyncio.to_thread(space.check_memory, release, settings.slots, available)

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[None]:
        """Where the engine holds one model only, gateways let new requests wait meanwhile: each would push the new model out again."""
        if self._settings.engine != "ollama" or self._settings.engine_models > 1:
            yield
            return
        with self._state.mark() as renew:
            beating = asyncio.create_task(_beat(renew))
            try:
                yield
            finally:
                beating.cancel()

    async def _tidy(self, wanted: Wanted) -> None:
        """Delete what nobody can go back to. A kill before or in the middle of it costs disk until the next load, nothing else."""
        kept = [wanted.live, *([wanted.previous] if wanted.previous else [])]
        try:
            for model in await self._host.prune(wanted.live.manifest.name, {entry.release.model for entry in kept}):
                self._say(f"deleted {model}")
        except EngineError as error:
            self._say(f"older releases stay: {error}")
        in_use = {entry.manifest.release for entry in kept} if self._settings.engine == "embedded" else set()
        for directory in self._unpacked.glob("*"):
            if directory.name not in in_use:  # by name: a path may be spelled in many ways
                shutil.rmtree(directory, ignore_errors=True)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        """One loader at a time on one state directory."""
        told = False
        while True:
            with ExitStack() as held:
                try:
                    held.enter_context(self._state.lock())
                except OSError as error:
                    if not isinstance(error, BlockingIOError):
                        raise SetupError(f"--state {self._state.directory}: cannot be written: {error.strerror}") from error
                else:
                    yield
                    return
            if not told:
                self._say("another loader is at work: waiting for it")
                told = True
            await asyncio.sleep(BEAT_S)


async def _beat(renew: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        renew()


def _other(before: Wanted | None, release: Release) -> Entry | None:
    """What a rollback from `release` goes back to: what was wanted before it, or before that if it is the same again."""
    if before is None:
        return None
    return before.previous if before.live.manifest.release == release.manifest.release else before.live


def _intact(directory: Path, made: Manifest) -> Release | None:
    """What was unpacked before, with every byte checked; None: it is not there, or it was damaged or is another one, and then deleted."""
    try:
        release = manifest.read(directory)
    except ReleaseError:
        release = None
    if release and manifest.same_content(release.manifest, made):
        return release
    shutil.rmtree(directory, ignore_errors=True)
    return None


def _kept(entry: Entry) -> Release:
    """A release that was loaded before; with its bytes checked again, if it still has them. Raises ReleaseError."""
    if not entry.release.gguf.is_file():
        return entry.release
    return entry.read()
