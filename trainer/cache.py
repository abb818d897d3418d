"""Entries under paths.cache: directories that can be made again, there whole or not at all.

An entry is built in `<name>.partial` under a lock. Its record (files with sizes, times and hashes, and notes) is written last, then a
rename gives it its name, so that a crash leaves no entry that reads as whole. Opening one compares sizes and times
only; `verify` hashes every byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import EditedError, MachineError, TornError


class Stamp(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    mtime_ns: int
    sha256: str


class Entry(BaseModel):
    """The record inside an entry's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Hash of everything that decides the content."""
    files: dict[str, Stamp]
    notes: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Over the names and contents of all files, wherever and whenever they were made."""
        lines = "".join(f"{stamp.sha256}  {name}\n" for name, stamp in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass
class Draft:
    path: Path
    """The directory to fill."""
    notes: dict[str, Any] = field(default_factory=dict)


def key(**parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find(target: Path, record: str) -> Entry | None:
    """The entry, if all its files are there with their sizes; one whose time changed is hashed. Else None: build it again."""
    entry = _read(target / record)
    if entry is None:
        return None
    for name, stamp in entry.files.items():
        path = target / name
        if not path.is_file() or path.stat().st_size != stamp.num_bytes:
            return None
        if path.stat().st_mtime_ns != stamp.mtime_ns and sha256(path) != stamp.sha256:
            return None
    return entry


def open_record(target: Path, record: str) -> Entry:
    """The entry of a directory that must be one.

    Raises:
        TornError: no record in it, or files that do not fit it.
    """
    entry = find(target, record)
    if entry is None:
        raise TornError(
            f"{target}: not whole ({record} or the files that it names are missing or changed); delete it, the next run makes it again"
        )
    return entry


def verify(target: Path, record: str) -> Entry:
    """Hash every file of an entry.

    Raises:
        TornError: no record, or a file is missing.
        EditedError: a file's content is not what was written; all of them are named.
    """
    entry = _read(target / record)
    missing = [name for name in entry.files if not (target / name).is_file()] if entry else [record]
    if entry is None or missing:
        raise TornError(*(f"{target / name}: missing or unreadable; delete {target}, the next run makes it again" for name in missing))
    changed = [name for name, stamp in entry.files.items() if sha256(target / name) != stamp.sha256]
    if changed:
        raise EditedError(
            *(
                f"{target / name}: its content changed since it was written; delete {target}, the next run makes it again"
                for name in changed
            )
        )
    return entry


@contextmanager
def building(target: Path, record: str, key: str) -> Iterator[Draft]:
    """Yield an empty directory to fill; publish it as `target` if the block ends well, leave nothing if it does not."""
    partial, old = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    draft = Draft(partial)
    try:
        yield draft
        files = {str(path.relative_to(partial)): _stamp(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        entry = Entry(key=key, files=files, notes=draft.notes)
        (partial / record).write_text(entry.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in [*(partial / name for name in files), partial / record, partial]:
            _sync(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold an entry's lock: a second process waits until the first has built it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target.with_name(f"{target.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def need_room(directory: Path, num_bytes: int, what: str) -> None:
    """Refuse before the disk is full.

    Raises:
        MachineError: less free than num_bytes.
    """
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise MachineError(
            f"{directory}: {what} takes {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "make room, or put the cache on another disk: --set paths.cache=DIR"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Entry | None:
    try:
        return Entry.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(num_bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
