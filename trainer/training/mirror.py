"""A second place for the newest checkpoint: a mounted Drive that outlives the machine.

Such a mount has no links and no rename that can be trusted, and what is deleted there keeps counting for a while. So there are
two slots, each a file of its own that is overwritten in place, and beside each a small record, also overwritten:

    a.tar  a.json  b.tar  b.json

A slot is written in this order: its record is blanked; the tar; flush; the record with size and sha256; flush. The other slot
stays whole meanwhile. A slot counts only if the tar has the bytes that its record names, so a copy that was cut off anywhere,
or a byte that flipped, is never restored. The newest slot is the one with the highest count: no clock has a say.

A slot holds the checkpoint and whatever else the train's directory holds: the best adapter, the metrics.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer import artifacts, cache, progress
from trainer.errors import MachineError, StaleError
from trainer.training import checkpoints
from trainer.training.checkpoints import RESTORING, Origin

SLOTS: tuple[Literal["a", "b"], ...] = ("a", "b")
RECORD_BYTES = 1024
"""A record's file always has this size."""
CHUNK_BYTES = 2**20


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    """Of slots written so far, of all runs in this directory."""
    step: int
    origin: Origin
    num_bytes: int
    sha256: str


class Slot(NamedTuple):
    name: Literal["a", "b"]
    record: Record


class Mirror:
    def __init__(self, directory: Path, origin: Origin, *, fresh: bool = False) -> None:
        """
        directory: the user's, and a folder of the run's name in it. fresh: another training's slots may be overwritten.

        Raises:
            MachineError: the user's directory is not there. Making it would write to the local disk where a Drive is not mounted.
        """
        if not directory.parent.is_dir():
            raise MachineError(f"checkpoint.mirror = {directory.parent}: no such directory; mount the drive, or make the directory first")
        self._directory, self._origin, self._fresh = directory, origin, fresh
        self._last: Slot | None = None
        self._looked = False

    def save(self, checkpoint: Path, out: Path) -> None:
        """Copy the checkpoint and its companions into the older slot. A failure is told and never ends the training."""
        started = time.monotonic()
        try:
            slot = self._write(checkpoint, out)
        except OSError as error:
            progress.say(f"warning: the mirror {self._directory} could not be written ({error}); training goes on without this copy")
            return
        size, took = slot.record.num_bytes / 1e6, progress.duration(time.monotonic() - started)
        progress.say(f"mirror: step {slot.record.step} is in slot {slot.name}, {size:,.1f} MB in {took}")

    def restore(self, out: Path) -> None:
        """Bring back the newest whole slot of this training where `out` has no checkpoint.

        Raises:
            StaleError: all that is mirrored is another training's, which the next copies would overwrite.
        """
        strange: list[str] = []
        for slot in self._newest_first():
            if slot.record.origin != self._origin:
                different = "; ".join(slot.record.origin.differences(self._origin))
                progress.say(f"mirror: slot {slot.name} holds another training ({different}): not restored")
                if (slot.record.origin.key, slot.record.origin.base_sha256) != (self._origin.key, self._origin.base_sha256):
                    strange.append(f"  slot {slot.name}, step {slot.record.step}: {different}")
            elif self._unpack(slot, out):
                self._last, self._looked = slot, True
                progress.say(f"mirror: step {slot.record.step} restored from slot {slot.name} of {self._directory}")
                return
            else:
                progress.say(f"mirror: slot {slot.name} (step {slot.record.step}) is not whole: not restored")
        if strange and not self._fresh:
            raise StaleError(
                f"{self._directory} mirrors a training under other settings or data, and new copies would overwrite it:",
                *strange,
                "undo the change, or keep both: --set run.name=OTHER, or give the old one up: --set run.fresh=true",
            )

    def _write(self, checkpoint: Path, out: Path) -> Slot:
        self._directory.mkdir(exist_ok=True)
        last = self._newest_whole()
        name = next(slot for slot in SLOTS if last is None or slot != last.name)
        self._put_record(name, b"")
        with _in_place(self._tar(name)) as file:
            hashed = _Hashed(file)
            with tarfile.open(fileobj=cast("IO[bytes]", hashed), mode="w|", format=tarfile.PAX_FORMAT) as tar:
                for path in [*_companions(out), checkpoint]:
                    tar.add(path, arcname=str(path.relative_to(out)))
            file.truncate(hashed.num_bytes)
            file.flush()
            os.fsync(file.fileno())
        record = Record(
            count=last.record.count + 1 if last else 1,
            step=checkpoints.step_of(checkpoint),
            origin=self._origin,
            num_bytes=hashed.num_bytes,
            sha256=hashed.digest.hexdigest(),
        )
        self._put_record(name, record.model_dump_json().encode())
        self._last = Slot(name, record)
        return self._last

    def _newest_whole(self) -> Slot | None:
        """The slot that must not be overwritten. Its bytes are read once in a process: a record alone may outlive its slot."""
        if not self._looked:
            self._last = next((slot for slot in self._newest_first() if is_whole(self._directory, slot.name)), None)
            self._looked = True
        return self._last

    def _newest_first(self) -> list[Slot]:
        found = [Slot(name, record) for name in SLOTS if (record := _record(self._directory, name))]
        return sorted(found, key=lambda slot: -slot.record.count)

    def _put_record(self, name: str, text: bytes) -> None:
        assert len(text) <= RECORD_BYTES
        with _in_place(self._json(name)) as file:
            file.write(text.ljust(RECORD_BYTES))
            file.truncate(RECORD_BYTES)
            file.flush()
            os.fsync(file.fileno())

    def _unpack(self, slot: Slot, out: Path) -> bool:
        """Hash first, on the way into a local copy: a Drive is slow and is read once. Then unpack, and move the checkpoint last."""
        scratch = out / RESTORING
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        with checkpoints.writing(out), (scratch / "slot.tar").open("w+b") as local:
            if not self._fetch(slot, local):
                shutil.rmtree(scratch)
                return False
            with tarfile.open(fileobj=local, mode="r:") as tar:
                tar.extractall(scratch, filter="data")
        (scratch / "slot.tar").unlink()
        checkpoints.flush(scratch)
        (out / "checkpoints").mkdir(exist_ok=True)
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == "checkpoints"):
            found = path.iterdir() if path.name == "checkpoints" else [path]
            for one in list(found):
                target = out / one.relative_to(scratch)
                if target.is_dir():
                    shutil.rmtree(target)
                one.rename(target)
        shutil.rmtree(scratch)
        return True

    def _fetch(self, slot: Slot, local: IO[bytes]) -> bool:
        """Copy a slot; False if its bytes are not those of its record."""
        digest = hashlib.sha256()
        try:
            file = self._tar(slot.name).open("rb")
        except OSError:
            return False
        with file:
            while chunk := _read(file):
                digest.update(chunk)
                local.write(chunk)
        local.seek(0)
        return digest.hexdigest() == slot.record.sha256

    def _tar(self, name: str) -> Path:
        return self._directory / f"{name}.tar"

    def _json(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def companion(directory: Path, key: str, name: str) -> bytes | None:
    """One small file of the newest slot that a training of this key wrote, before that slot is restored; None where there is none.

    Reads that file alone and not the slot's hash, so it may only say how to go on and never what was trained.
    """
    found = [(record.count, slot) for slot in SLOTS if (record := _record(directory, slot)) and record.origin.key == key]
    if not found:
        return None
    try:
        with tarfile.open(directory / f"{max(found)[1]}.tar", mode="r:") as tar:
            file = tar.extractfile(name)
            return file.read() if file else None
    except (OSError, KeyError, tarfile.TarError):
        return None


def is_whole(directory: Path, name: str) -> bool:
    """Whether a slot has the bytes that its record names. Reads all of it."""
    record = _record(directory, name)
    try:
        return record is not None and cache.sha256(directory / f"{name}.tar") == record.sha256
    except OSError:
        return False


def _record(directory: Path, name: str) -> Record | None:
    try:
        return Record.model_validate_json((directory / f"{name}.json").read_bytes())
    except (OSError, ValidationError):
        return None


class _Hashed:
    """A file to write to that hashes and counts."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def _read(file: IO[bytes]) -> bytes:
    """The next piece; nothing more where the drive fails, so that the hash will not fit."""
    try:
        return file.read(CHUNK_BYTES)
    except OSError:
        return b""


def _in_place(path: Path) -> IO[bytes]:
    """Open for writing over what is there: nothing is deleted, and nothing is cut off before the new end is known."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")


def _companions(out: Path) -> list[Path]:
    """What a train's directory holds beside its checkpoints, but for what is made anew or is half written."""
    made_anew = {"checkpoints", "adapter", artifacts.DRAFT, RESTORING}
    return sorted(path for path in out.iterdir() if path.name not in made_anew and path.suffix not in {".new", ".old"})
