"""The release manifest's tolerant reader: keys it does not know are ignored, a schema_version it does not know is refused.

A release is a directory with manifest.json and the files named in it. Files are found by `files`, never by name, and
every byte of them is hashed before an engine sees it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.chat import Message, Role
from server.errors import ReleaseError

SCHEMA_VERSION = 1
NAME = "manifest.json"


class Part(BaseModel):
    """A part of the manifest: frozen and open, so that a newer trainer may add keys."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class File(Part):
    path: str = Field(pattern=r"^[^\x00]+$")
    """Relative to the manifest's directory."""
    num_bytes: int
    sha256: str


class Sampling(Part):
    temperature: float
    top_k: int
    top_p: float
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    num_predict: int


class Rewrite(Part):
    old: str
    new: str


class Prompt(Part):
    template: str
    stop: tuple[str, ...]
    num_ctx: int = Field(ge=1)
    sampling: Sampling
    rewrite: tuple[Rewrite, ...]
    """Literal replacements, in order, in every message's text."""
    strip: tuple[Role, ...]
    """Roles whose text is trimmed after that."""


class Manifest(Part):
    schema_version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    release: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Names a directory, and a model's tag at Ollama."""
    created: AwareDatetime
    base: Mapping[str, Any] = Field(default_factory=dict)
    """What was tuned: name, revision, hash. Shown, never acted on; likewise adapter and quantization."""
    adapter: Mapping[str, Any] = Field(default_factory=dict)
    quantization: str = ""
    files: Mapping[str, File]
    prompt: Prompt

    @field_validator("files")
    @classmethod
    def _complete(cls, files: Mapping[str, File]) -> Mapping[str, File]:
        if missing := [name for name in ("gguf", "probes") if name not in files]:
            raise ValueError(f"names no {' and no '.join(missing)}")
        return files


class ProbeMessage(Part):
    role: Role
    content: str


class Probe(Part):
    """What the trainer's engine rendered, tokenized and answered (greedy): another engine must do alike."""

    messages: tuple[ProbeMessage, ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str

    @property
    def conversation(self) -> tuple[Message, ...]:
        return tuple(Message(message.role, message.content) for message in self.messages)


@dataclass(frozen=True)
class Release:
    """A release whose files were all there and unchanged when it was read."""

    directory: Path
    manifest: Manifest
    probes: tuple[Probe, ...]

    @property
    def model(self) -> str:
        """Its name at an engine and in replies: NAME:RELEASE."""
        return f"{self.manifest.name}:{self.manifest.release}"

    @property
    def gguf(self) -> Path:
        return self.directory / self.manifest.files["gguf"].path

    @property
    def sha256(self) -> str:
        return self.manifest.files["gguf"].sha256


def terms(releases: Path) -> list[str]:
    """What the release that find() finds says of its base model's licence, a line each; nothing where it says nothing. Nothing is hashed."""
    try:
        directory = find(releases)
        tree = json.loads((directory / NAME).read_bytes()) if directory else {}
        return [f"{one['name']}, {one['url']}" for one in tree["licences"] if one["applies_to"] == "base"]
    except (OSError, ValueError, KeyError, TypeError, ReleaseError):
        return []


def find(releases: Path) -> Path | None:
    """The release to serve: `releases` itself if it is one, else where its link `current` points now, else the newest; None: not there.

    Raises ReleaseError where one may be there and this process is not let in.
    """
    with readable(releases):
        for candidate in (releases, releases / "current"):
            if (candidate / NAME).is_file():
                return candidate.resolve()
        if (releases / "current").is_dir():
            raise ReleaseError(f"{releases / 'current'} has no manifest.json: release again with `make train` or `make demo`")
    # Drive and Windows lose links.
    found = [(made.created, directory) for directory in directories(releases) if (made := whole(directory))]
    if not found:
        check_readable(releases)
    return max(found)[1] if found else None


@contextmanager
def readable(releases: Path) -> Iterator[None]:
    """Raises ReleaseError with the remedy for what the system refuses to read within the block."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or releases, error.strerror or error
        raise ReleaseError(f"{where} cannot be read by user {os.getuid()} ({why}): on the host, chmod -R a+rX {releases}") from error


def check_readable(releases: Path) -> None:
    """Raises ReleaseError if `releases`, a directory in it or a manifest may not be read; one that is not there may."""
    with readable(releases):
        for path in sorted(releases.iterdir()) if releases.is_dir() else ():
            if path.is_dir() and (path / NAME).is_file():
                (path / NAME).open("rb").close()


def directories(releases: Path) -> list[Path]:
    """Directories in `releases` that hold a manifest; links (`current`) are none of them."""
    return sorted(path.parent.resolve() for path in releases.glob(f"*/{NAME}") if not path.parent.is_symlink())


def whole(directory: Path) -> Manifest | None:
    """Its manifest if all files are there in their sizes (their bytes are for read() to check)."""
    try:
        made = parse(directory / NAME)
        complete = all((directory / file.path).stat().st_size == file.num_bytes for file in made.files.values())
    except (ReleaseError, OSError):
        return None
    return made if complete else None


def stamp(releases: Path) -> tuple[object, ...]:
    """What find() and read() would see, by names, sizes and times alone: unequal once a release was changed or another took its place."""
    directory = releases
    try:
        directory = (releases if (releases / NAME).exists() else releases / "current").resolve()
        folders = [directory] if directory.is_dir() else [releases, *directories(releases)]
        inside = (path for folder in folders for path in sorted(folder.iterdir()))
        found = [(path, path.stat()) for path in ([releases] if releases.is_file() else inside)]  # a file: an archive
    except OSError:
        return (directory,)
    return (directory, *((str(path), stat.st_size, stat.st_mtime_ns, stat.st_mode) for path, stat in found))  # mode: who may read it


def read(directory: Path) -> Release:
    """Read and check a release.

    Raises:
        ReleaseError: no or broken manifest, unknown schema_version, a file missing, of another size or with other bytes.
    """
    manifest = parse(directory / NAME)
    problems = [problem for name, file in manifest.files.items() if (problem := _problem(directory, name, file))]
    if problems:
        raise ReleaseError("; ".join(problems))
    return Release(directory, manifest, _probes(directory / manifest.files["probes"].path))


def parse(path: Path) -> Manifest:
    """A manifest.json by itself. Raises ReleaseError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReleaseError(
            f"{path}: cannot be read: {error.strerror}: let the server's user read it (chmod -R a+rX on its releases)"
        ) from error
    return parse_bytes(path, content)


def parse_bytes(path: Path, content: bytes) -> Manifest:
    """The same where the bytes come from elsewhere; `path` is for the error."""
    try:
        tree = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path}: not valid JSON ({error}): release again, or copy the release whole") from error
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise ReleaseError(
            f"{path}: schema_version is {version!r} and this server reads {SCHEMA_VERSION}: "
            "update the server to the version that made the release, or release again with this one"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        raise ReleaseError(f"{path}: {explain(error)}: release again") from error


def _problem(directory: Path, name: str, file: File) -> str | None:
    path = directory / file.path
    if leads_out(file.path):
        return f"files.{name}: {file.path} leads out of the release"
    try:
        if not path.is_file():
            return f"files.{name}: {path} is missing: copy the release whole, or release again"
        if (size := path.stat().st_size) != file.num_bytes:
            return f"files.{name}: {path} has {size} bytes, not {file.num_bytes}: copy the release whole, or release again"
        if sha256(path) != file.sha256:
            return f"files.{name}: {path} was changed after its release (sha256 differs): copy it again, or release again"
    except OSError as error:
        return f"files.{name}: {path} cannot be read ({error.strerror}): let the server's user read it, or copy it again"
    return None


def same_content(one: Manifest, other: Manifest) -> bool:
    """Whether both make an engine answer alike; a release that was made twice differs in `created`."""
    return (one.files, one.prompt) == (other.files, other.prompt)


def check_id(live: Manifest, new: Manifest) -> None:
    """Raises ReleaseError for another content under the id of what answers: engines know a model by it and would overwrite that one."""
    if live.release == new.release and not same_content(live, new):
        raise ReleaseError(
            f"{new.name}:{new.release} is in service with another prompt or other files; an id names one content: release again"
        )


def leads_out(name: str) -> bool:
    """Whether a name from a file, read as on Unix or as on Windows, means something outside of its directory."""
    windows = PureWindowsPath(name)
    return PurePosixPath(name).is_absolute() or bool(windows.drive or windows.root) or ".." in windows.parts


def _probes(path: Path) -> tuple[Probe, ...]:
    try:
        probes = tuple(Probe.model_validate_json(line) for line in path.read_bytes().split(b"\n") if line.strip())
    except ValidationError as error:
        raise ReleaseError(f"{path}: {explain(error)}: release again") from error
    if not probes:
        raise ReleaseError(f"{path}: holds no probe, so no engine can be checked against it: release again")
    return probes


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: ValidationError, limit: int = 5) -> str:
    """What pydantic found, in one line: field, complaint, value."""
    return "; ".join(_explain(item) for item in error.errors(include_url=False)[:limit])


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    value = "" if item["type"] in ("missing", "extra_forbidden", "value_error") else f", not {json.dumps(item['input'], default=str)[:80]}"
    return f"{where + ': ' if where else ''}{item['msg'].removeprefix('Value error, ')}{value}"
