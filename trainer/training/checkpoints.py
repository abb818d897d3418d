"""Checkpoints on disk, each whole or not there: written under another name, hashed, flushed, renamed.

`checkpoint.json` is written last. It names the run and the base weights that a checkpoint belongs to and the hash of each of
its files; one that does not fit its record is passed over for the one before it. No decision looks at a clock or a file's time.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from trainer import cache, progress
from trainer.artifacts import FileRecord, write_whole
from trainer.errors import MachineError, StaleError

PREFIX = "checkpoint-"
PARTIAL = "partial"
GONE = ".gone"
RESTORING = "restoring"
"""Where a mirror's slot is unpacked."""
RECORD = "checkpoint.json"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOENT, errno.ENOTDIR}


class Origin(BaseModel):
    """What a checkpoint is a state of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Of the train stage: config, data and code. Empty where no pipeline gave one."""
    base_sha256: str
    """Over the NF4 state."""
    rank: int
    """As trained: not in the key where memory ran out on the way."""
    dora: bool

    def differences(self, now: Origin) -> list[str]:
        """What is another now, one short line each."""
        return [
            f"{name}: {before} -> {after}"
            for (name, before), (_, after) in zip(self.model_dump().items(), now.model_dump().items(), strict=True)
            if before != after
        ]


class Record(BaseModel):
    """checkpoint.json"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    origin: Origin
    files: dict[str, FileRecord]


class Schedule:
    """When minutes alone ask for a checkpoint. The clock only ever runs forwards."""

    def __init__(self, every_minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = 60 * every_minutes, clock
        self._saved = clock()

    def due(self) -> bool:
        return self._clock() - self._saved >= self._every_s

    def saved(self) -> None:
        self._saved = self._clock()


def newest(directory: Path, origin: Origin) -> Path | None:
    """The whole checkpoint with the most steps, or None.

    Raises:
        StaleError: it belongs to another run or other base weights.
    """
    for found in reversed(every(directory)):
        record = whole(found)
        if record is None:
            progress.say(f"train: {found} is not whole; going back to the checkpoint before it")
            continue
        if different := record.origin.differences(origin):
            raise StaleError(f"{found} is a state of another training:", *(f"  {line}" for line in different), f"delete {directory}")
        return found
    return None


def whole(checkpoint: Path) -> Record | None:
    """Its record, if every file is there with the bytes that were written."""
    try:
        record = Record.model_validate_json((checkpoint / RECORD).read_bytes())
        files = {name: (checkpoint / name).stat().st_size for name in record.files}
    except (OSError, ValidationError):
        return None
    for name, file in record.files.items():
        if files[name] != file.num_bytes or cache.sha256(checkpoint / name) != file.sha256:
            return None
    return record


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def seal(written: Path, directory: Path, keep: int, origin: Origin) -> Path:
    """Move a finished checkpoint from where it was written into `directory`, and delete all but the `keep` newest."""
    target = directory / written.name
    files = {
        str(file.relative_to(written)): FileRecord(num_bytes=file.stat().st_size, sha256=cache.sha256(file))
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    flush(written)
    write_whole(written / RECORD, Record(step=step_of(written), origin=origin, files=files).model_dump_json(indent=1).encode())
    _delete(target)  # only one that was not whole can stand there
    written.rename(target)
    _flush_directory(directory)
    torn = [later for later in every(directory) if step_of(later) > step_of(target)]  # passed over: the training went on from before them
    for old in [*torn, *[one for one in every(directory) if one not in torn][:-keep]]:
        _delete(old)
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
    for gone in [directory / RESTORING, *(directory / "checkpoints").glob(f"*{GONE}")]:
        shutil.rmtree(gone, ignore_errors=True)
    for name in ("best", "adapter"):
        target, old = directory / name, directory / f"{name}.old"
        shutil.rmtree(directory / f"{name}.new", ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Within the block a write that finds no room, or no permission, ends the training with an error that says what is kept.

    What was half written is deleted, so that there is room again for whatever mends it. torch does not say why it could not write:
    its RuntimeError only names its writer.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        if isinstance(error, OSError) and error.errno not in _DISK:  # a lost network, a closed pipe
            raise
        if os.access(directory, os.W_OK):
            tidy(directory)
        kept = every(directory / "checkpoints")
        left = f"the checkpoint of step {step_of(kept[-1])} is kept" if kept else "no checkpoint was written yet"
        free = shutil.disk_usage(directory).free
        raise MachineError(
            f"{directory}: a checkpoint or an adapter could not be written ({error}; {free / 1e6:.0f} MB are free now); {left}. "
            "Free some room, or put the run on another disk with --set paths.output=DIR; the same command goes on"
        ) from error


def every(directory: Path) -> list[Path]:
    """All checkpoints, by their steps."""
    found = [path for path in directory.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(found, key=step_of)


def flush(directory: Path) -> None:
    """fsync every file in the directory and the directory itself."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    _flush_directory(directory)


def _delete(checkpoint: Path) -> None:
    """Under another name first: what still bears a checkpoint's name is whole."""
    if checkpoint.exists():
        gone = checkpoint.with_name(checkpoint.name + GONE)
        shutil.rmtree(gone, ignore_errors=True)
        checkpoint.rename(gone)
        shutil.rmtree(gone)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
