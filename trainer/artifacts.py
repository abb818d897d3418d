"""Publish a directory whole or not at all; refuse torn, edited or foreign ones when reading.

A stage works in `<stage>.partial`. When it is done every file is hashed and flushed, `artifact.json` is written last, and two
renames put the new directory in the old one's place:

    train.partial -> (artifact.json inside: whole) ; train -> train.old ; train.partial -> train ; train.old deleted

A crash between any two of these steps leaves something that recover() finishes or undoes. `draft.json` names the key that
a partial was begun under, so that a train is resumed only as itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import EditedError, LockedError, TornError
from trainer.facts import Facts

F = TypeVar("F", bound=Facts)

RECORD = "artifact.json"
DRAFT = "draft.json"
SCRATCH = "checkpoints"
"""A folder that a stage keeps only while it is unfinished. It goes when the stage is published, not before: a crash in between
must find it."""


class Inputs(Protocol):
    """What a stage may read: the published directories and the facts of the stages before it."""

    def path(self, stage: str) -> Path: ...

    def facts(self, kind: type[F]) -> F: ...


class Label(BaseModel):
    """Everything that decides a stage's output. Two equal labels have equal keys, and equal keys mean: nothing to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    sections: dict[str, Any]
    """Config values that differ from the defaults, by dotted name."""
    sources: dict[str, str]
    """sha256 of what the stage reads from outside output/."""
    inputs: dict[str, Label]

    @property
    def key(self) -> str:
        tree = {
            "stage": self.stage,
            "version": self.version,
            "sections": self.sections,
            "sources": self.sources,
            "inputs": {name: label.key for name, label in sorted(self.inputs.items())},
        }
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Label) -> list[str]:
        """What changed from self to other, one short line each, the inputs' changes included."""
        lines = []
        if self.version != other.version:
            lines.append(f"{self.stage}: code version {self.version} -> {other.version}")
        for name in sorted(self.sections.keys() | other.sections.keys()):
            before, after = (_shown(label.sections, name) for label in (self, other))
            if before != after:
                lines.append(f"{name}: {before} -> {after}")
        changed = {name for name, _ in self.sources.items() ^ other.sources.items()}
        lines += [f"{self.stage}: the content of its {name} changed" for name in sorted(changed)]
        for name in sorted(self.inputs.keys() & other.inputs.keys()):
            lines += self.inputs[name].differences(other.inputs[name])
        return lines


def _shown(sections: Mapping[str, Any], name: str) -> str:
    return json.dumps(sections[name]) if name in sections else "(default)"


class FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    sha256: str


class Record(BaseModel):
    """artifact.json"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    label: Label
    files: dict[str, FileRecord]
    facts: dict[str, Any]
    wall_s: float


class Artifact(NamedTuple, Generic[F]):
    path: Path
    key: str
    label: Label
    facts: F
    wall_s: float


class Hashes:
    """sha256 of files, remembered by size and mtime, so that 24 GB of weights are read once."""

    def __init__(self, memo: Path) -> None:
        self._memo_path = memo
        try:
            self._memo: dict[str, list[Any]] = json.loads(memo.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            self._memo = {}

    def of(self, path: Path) -> str:
        """Hash of a file, or of a directory's files and their relative names."""
        if path.is_dir():
            parts = [(str(file.relative_to(path)), self.of(file)) for file in _files(path)]
            return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        stat = path.stat()
        known = self._memo.get(str(path.resolve()))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.remember(path, digest)
        return digest

    def remember(self, path: Path, digest: str) -> None:
        stat = path.stat()
        self._memo[str(path.resolve())] = [stat.st_size, stat.st_mtime_ns, digest]

    def save(self) -> None:
        self._memo_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._memo_path, json.dumps(self._memo).encode())


class Draft:
    """A stage's working directory. `facts` is set by the caller before the context ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: Facts | None = None
        self.wall_s = 0.0


@contextmanager
def publish(target: Path, label: Label, hashes: Hashes, *, resume: bool = False) -> Iterator[Draft]:
    """Work in `<target>.partial`, publish as `target` when the block ends without an exception.

    resume: keep what an interrupted run of the same key left in the partial; anything else is cleared first.
    On an exception the partial stays where it is: recover() or the next publish() deals with it.
    """
    partial = _beside(target, "partial")
    if not (resume and draft_label(target) == label):
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    for torn in partial.glob("*.new"):
        if torn.is_file():  # a directory is the stage's own, which tidies it
            torn.unlink()
    write_whole(partial / DRAFT, label.model_dump_json().encode())
    draft = Draft(partial)
    yield draft
    assert draft.facts is not None, "a stage returns what it measured"
    record = Record(
        key=label.key, label=label, files=_seal(partial, hashes), facts=draft.facts.model_dump(mode="json"), wall_s=draft.wall_s
    )
    write_whole(partial / RECORD, record.model_dump_json(indent=1).encode())
    _swap(target)
    for name, file in record.files.items():
        hashes.remember(target / name, file.sha256)


def draft_label(target: Path) -> Label | None:
    """The label that an unfinished `target` was begun under."""
    try:
        return Label.model_validate_json(_beside(target, "partial").joinpath(DRAFT).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def recover(run: Path) -> None:
    """Finish or undo what a crash left in a run's directory. Call under the run's lock, before anything is read."""
    if not run.is_dir():
        return
    for partial in run.glob("*.partial"):
        target = partial.with_suffix("")
        if partial.joinpath(RECORD).is_file():
            _swap(target)
    for old in run.glob("*.old"):
        target = old.with_suffix("")
        if target.is_dir():
            shutil.rmtree(old)
        else:
            old.rename(target)


def read_label(target: Path) -> Label | None:
    """The label of a published stage, whatever its facts look like; None where there is none."""
    record = _record(target)
    return record.label if record else None


def read(target: Path, kind: type[F], hashes: Hashes) -> Artifact[F] | None:
    """A published stage, checked; None where there is none.

    Raises:
        TornError: the directory or a file of it is not whole.
        EditedError: a file's bytes are not those that were published.
    """
    record = _record(target)
    if record is None:
        return None
    remedy = f"delete {target} and run the stage again"
    missing = [name for name in record.files if not (target / name).is_file()]
    if missing:
        raise TornError(*(f"{target / name} is missing; {remedy}" for name in missing))
    edited = [name for name, file in record.files.items() if hashes.of(target / name) != file.sha256]
    if edited:
        raise EditedError(*(f"{target / name} was changed after it was published; {remedy}" for name in edited))
    return Artifact(target, record.key, record.label, kind.model_validate_json(json.dumps(record.facts)), record.wall_s)


def _record(target: Path) -> Record | None:
    if not target.exists():
        return None
    path = target / RECORD
    try:
        record = Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise TornError(f"{target} has no {RECORD}: it was not published whole; delete it and run the stage again") from None
    except ValidationError as error:
        raise EditedError(f"{path} cannot be read ({error.error_count()} problems); delete {target} and run the stage again") from error
    if record.key != record.label.key:
        raise EditedError(f"{path} was edited: its key does not fit its label; delete {target} and run the stage again")
    return record


def set_aside(target: Path) -> Path:
    """Move a finished or unfinished stage to `<stage>.aside` (replacing an earlier one) and return that path."""
    aside = _beside(target, "aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in (target, _beside(target, "partial")):
        if path.exists():
            path.rename(aside / path.name)
    return aside


def expose(release: Path, root: Path, name: str) -> Path:
    """Link a release's files into `root/<name>` (whole or not at all) and move the link `root/current` to it.

    A release never changes: one that stands there already is left as it is.
    """
    target = root / name
    if not target.is_dir():
        partial = _beside(target, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in _files(release):
            if file.name != RECORD:
                link_or_copy(file, partial / file.relative_to(release))
        _flush(partial)
        partial.rename(target)
    link = root / "current.new"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(root / "current")
    _sync(root)
    return target


def link_or_copy(source: Path, target: Path) -> None:
    """Hard link where the file system can, else copy. Published files are never written again, so sharing them is safe."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


@contextmanager
def lock(run: Path) -> Iterator[int]:
    """Hold the run's lock; yields its descriptor, which a worker inherits so that the lock lives as long as any of them."""
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LockedError(f"{run} is in use by another trainer; wait for it, or give this run a name: --set run.name=OTHER") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old bytes or the new, never a mixture."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _seal(partial: Path, hashes: Hashes) -> dict[str, FileRecord]:
    _flush(partial)
    return {
        str(file.relative_to(partial)): FileRecord(num_bytes=file.stat().st_size, sha256=hashes.of(file))
        for file in _files(partial)
        if file != partial / DRAFT and partial / SCRATCH not in file.parents
    }


def _swap(target: Path) -> None:
    partial, old = _beside(target, "partial"), _beside(target, "old")
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial / SCRATCH, ignore_errors=True)
    (partial / DRAFT).unlink(missing_ok=True)  # only now: a crash while hashing must leave a train that is known by its label
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _flush(directory: Path) -> None:
    for path in [*_files(directory), *(path for path in directory.rglob("*") if path.is_dir()), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
