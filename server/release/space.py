"""Whether a release fits, asked before a byte of it moves: disk where it will lie, memory where it will answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from server.errors import NoRoom
from server.manifest import Release
from server.release import gguf

MEMINFO = Path("/proc/meminfo")
SPARE_BYTES = 64 << 20
"""Of a disk: for whoever else writes there."""
BESIDE_BYTES = 2 << 30
"""Of a container's memory, beside a model: 1 GiB for prompts that llama-server keeps (compose.yaml sets it), as much for Ollama itself."""


class Written(NamedTuple):
    """What is about to be written."""

    what: str
    where: Path
    num_bytes: int


def check_disk(model: str, writes: Iterable[Written]) -> None:
    """Raises NoRoom with every disk that is too small, in one line."""
    problems = []
    by_disk: dict[int, list[Written]] = {}
    for item in writes:
        if item.num_bytes:
            by_disk.setdefault(_existing(item.where).stat().st_dev, []).append(item)
    for items in by_disk.values():
        free = shutil.disk_usage(_existing(items[0].where)).free
        if (needed := sum(item.num_bytes for item in items) + SPARE_BYTES) > free:
            parts = " + ".join(f"{item.what} {_gb(item.num_bytes)}" for item in items)
            problems.append(f"{items[0].where} has {_gb(free)} free and {_gb(needed)} are needed ({parts}, some to spare)")
    if problems:
        raise NoRoom(f"{model} does not fit on disk beside the release before it: {'; '.join(problems)}: make room there")


class Need(NamedTuple):
    """Of the engine's memory, bytes."""

    weights: int
    cache: int
    batch: int

    @property
    def total(self) -> int:
        return sum(self)


def need(release: Release, slots: int) -> Need:
    """Raises ReleaseError for what is no GGUF."""
    shape = gguf.read(release.gguf)
    cache = shape.cache_bytes(release.manifest.prompt.num_ctx, slots)
    return Need(release.manifest.files["gguf"].num_bytes, cache, shape.batch_bytes)


def check_memory(release: Release, slots: int, available: int | None) -> None:
    """`available`: bytes that the engine may still use; None: nobody knows. Raises NoRoom, or ReleaseError for what is no GGUF."""
    needed = need(release, slots)
    if available is not None and needed.total > available:
        raise NoRoom(
            f"{release.model} needs {_gb(needed.total)} of the engine's memory (weights {_gb(needed.weights)}, "
            f"{slots} x {release.manifest.prompt.num_ctx} tokens of context {_gb(needed.cache)}, a batch {_gb(needed.batch)}) and "
            f"{_gb(available)} are there: fewer slots, a release with a smaller num_ctx, or more memory"
        )


def machine_memory() -> int:
    """Bytes that this machine could give to a new process without swapping."""
    for line in MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("every Linux since 3.14 says MemAvailable")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
