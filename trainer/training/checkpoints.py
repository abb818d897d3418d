"""Checkpoints on disk, each whole or not there: written under another name, flushed, renamed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

PREFIX = "checkpoint-"
PARTIAL = "partial"


def newest(directory: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    found = _all(directory)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def seal(written: Path, directory: Path, keep: int) -> Path:
    """Move a finished checkpoint from where it was written into `directory`, and delete all but the `keep` newest."""
    target = directory / written.name
    flush(written)
    if target.exists():
        shutil.rmtree(target)
    written.rename(target)
    _flush_directory(directory)
    for old in _all(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def replace(written: Path, target: Path) -> None:
    """Put a finished directory in the place of an older one; a crash in between leaves one of the two whole."""
    flush(written)
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    written.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def tidy(directory: Path) -> None:
    """Undo what a crash left: half-written directories go, a replaced one whose successor never came is put back."""
    shutil.rmtree(directory / "checkpoints" / PARTIAL, ignore_errors=True)
    for name in ("best", "adapter"):
        target, old = directory / name, directory / f"{name}.old"
        shutil.rmtree(directory / f"{name}.new", ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def flush(directory: Path) -> None:
    """fsync every file in the directory and the directory itself."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _all(directory: Path) -> list[Path]:
    found = [path for path in directory.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(found, key=step_of)
