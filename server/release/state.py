"""Which release is wanted: `release.json` in the state directory. The loader alone writes; gateways read, also over a read-only volume.

The file is replaced by rename, so that a reader sees a whole one and a kill at any moment leaves the old or the new. It holds
what a gateway must know of a release that its engine has already (manifest, first probes), so that with Ollama nobody needs
the GGUF again.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from server import manifest
from server.errors import ReleaseError
from server.manifest import Manifest, Part, Probe, Release, explain

STALE_S = 10.0
"""A loader that is alive touches its mark every second or so; one that was killed holds nobody up for longer than this."""


class Entry(Part):
    """A release that an engine has taken and whose probes it met."""

    directory: Path
    digest: str
    """The engine's name for what it loaded, as its status() shows it."""
    manifest: Manifest
    probes: tuple[Probe, ...]

    @property
    def release(self) -> Release:
        """As it was when it was loaded; its files may be gone by now."""
        return Release(self.directory, self.manifest, self.probes)

    def read(self) -> Release:
        """It once more from its files, with every byte checked. Raises ReleaseError: they are damaged, gone, or another release's."""
        release = manifest.read(self.directory)
        if release.manifest != self.manifest:
            raise ReleaseError(f"{self.directory} is not {self.release.model} any more: load it again with `python -m server release load`")
        return release


class Wanted(Part):
    schema_version: Literal[1] = 1
    engine: str
    """The setting `engine` of the loader: digests are that engine's."""
    live: Entry
    previous: Entry | None = None
    """What a rollback goes back to."""
    rolled_back: str = ""
    """The release that a rollback left; `load --watch` does not bring it back by itself."""


class State:
    """The state directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "release.json"
        self._mark = directory / "loading"

    def read(self) -> Wanted | None:
        """None: no release was ever loaded. Raises ReleaseError."""
        try:
            return Wanted.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ReleaseError(f"{self.path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise ReleaseError(f"{self.path}: {explain(error)}: delete it and run `python -m server release load`") from error

    def write(self, wanted: Wanted) -> None:
        new = self.path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(wanted.model_dump_json(indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def stamp(self) -> tuple[object, ...] | None:
        """Unequal once another file took its place; None: there is none."""
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def loading(self) -> bool:
        """A loader needs the engine's only model slot now: requests wait, else each of them would push its model out again."""
        try:
            return time.time() - self._mark.stat().st_mtime < STALE_S
        except OSError:
            return False

    @contextmanager
    def mark(self) -> Iterator[Callable[[], None]]:
        """Make loading() true for as long as the block lasts and the function that it gets is called every few seconds."""
        self._mark.touch()
        try:
            yield self._mark.touch
        finally:
            self._mark.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One loader at a time; the kernel lets go when its process dies. Raises BlockingIOError while another one holds it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
