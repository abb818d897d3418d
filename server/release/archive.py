"""Releases as they lie about: directories, or one .zip or .tar as Drive and Windows like to have them.

Of an archive only the manifest and the files that it names are unpacked, none larger than the manifest says. An archive with a
name or a link that leads out of it is refused as a whole.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from server import manifest
from server.errors import ReleaseError
from server.manifest import Manifest

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_MANIFEST_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)
"""What the libraries raise for a torn, encrypted (RuntimeError) or unknown kind of archive (NotImplementedError is one too), or for names
in no encoding (ValueError)."""


class Found(NamedTuple):
    path: Path
    """A release's directory, or its archive."""
    manifest: Manifest


class Member(NamedTuple):
    num_bytes: int
    open: Callable[[], IO[bytes]]


Members = Mapping[PurePosixPath, Member]


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def find(releases: Path) -> Found | None:
    """The release to load: `releases` itself, else its link `current`, else the newest that lies there whole. Raises ReleaseError."""
    if is_archive(releases):
        return look(releases)
    with manifest.readable(releases):
        direct = any((path / manifest.NAME).is_file() for path in (releases, releases / "current"))
    if direct:
        directory = manifest.find(releases)
        return Found(directory, manifest.parse(directory / manifest.NAME)) if directory else None
    found = listed(releases)
    if not found:
        manifest.check_readable(releases)
    return max(found, key=lambda found: found.manifest.created, default=None)


def listed(releases: Path) -> list[Found]:
    """Every release in a directory that is whole by names and sizes; what is not is left out."""
    found = [Found(directory, whole) for directory in manifest.directories(releases) if (whole := manifest.whole(directory))]
    for path in sorted(path for path in releases.glob("*") if is_archive(path)):
        try:
            found.append(look(path))
        except ReleaseError:
            continue
    return found


def look(path: Path) -> Found:
    """The newest release in an archive. Raises ReleaseError when there is none, or not all of it."""
    with _members(path) as members:
        return Found(path, _newest(path, members)[1])


def unpack(path: Path, into: Path) -> Path:
    """Unpack an archive's newest release to `into`/RELEASE, whole or not at all, and return that. Raises ReleaseError."""
    with _members(path) as members:
        folder, made = _newest(path, members)
        target, partial = into / made.release, into / f"{made.release}.partial"
        for old in (target, partial):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted({manifest.NAME, *(file.path for file in made.files.values())}):
            _copy(members[folder / file], partial / file)
        partial.rename(target)
    return target


def _newest(path: Path, members: Members) -> tuple[PurePosixPath, Manifest]:
    """The folder in the archive of its newest whole release, and its manifest."""
    found = [(name.parent, _manifest(path, name, member)) for name, member in members.items() if name.name == manifest.NAME]
    whole = [(folder, made) for folder, made in found if not _missing(folder, made, members)]
    if whole:
        return max(whole, key=lambda item: item[1].created)
    if found:
        raise ReleaseError(f"{path}: {_missing(*found[0], members)[0]}: pack the release whole")
    raise ReleaseError(f"{path}: holds no {manifest.NAME}: pack the directory of one release")


def _missing(folder: PurePosixPath, made: Manifest, members: Members) -> list[str]:
    problems = []
    for name, file in made.files.items():
        member = members.get(folder / file.path)
        if manifest.leads_out(file.path):
            problems.append(f"files.{name}: {file.path} leads out of the release")
        elif member is None:
            problems.append(f"files.{name}: {file.path} is not in the archive")
        elif member.num_bytes != file.num_bytes:
            problems.append(f"files.{name}: {file.path} has {member.num_bytes} bytes, not {file.num_bytes}")
    return problems


def _manifest(path: Path, name: PurePosixPath, member: Member) -> Manifest:
    if member.num_bytes > MAX_MANIFEST_BYTES:
        raise ReleaseError(f"{path}: {name} has {member.num_bytes} bytes and is no manifest")
    with member.open() as file:
        return manifest.parse_bytes(path / name, file.read(MAX_MANIFEST_BYTES))


def _copy(member: Member, target: Path) -> None:
    """Copy as many bytes as the archive's list promised, never more; the hash is checked afterwards, like that of any release."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.num_bytes
    with member.open() as source, target.open("xb") as file:
        while left and (chunk := source.read(min(CHUNK_BYTES, left))):
            file.write(chunk)
            left -= len(chunk)


@contextmanager
def _members(path: Path) -> Iterator[Members]:
    """The regular files of an archive by their names. Raises ReleaseError, also for what its reading raises within the block."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                yield _of_zip(path, file)
        else:
            with tarfile.open(path, "r:gz" if path.name.lower().endswith("gz") else "r:") as tar:
                yield _of_tar(path, tar)
    except BROKEN as error:
        raise ReleaseError(f"{path}: cannot be unpacked ({error or type(error).__name__}): copy it again") from error


def _of_zip(path: Path, file: zipfile.ZipFile) -> Members:
    members = {}
    for info in file.infolist():
        name = _inside(path, info.filename.replace("\\", "/"))  # as some programs on Windows write them
        if stat.S_ISLNK(info.external_attr >> 16):
            with file.open(info) as link:
                _inside(path, link.read(4096).decode("utf-8", "replace"))
        elif not info.is_dir():
            members[name] = Member(info.file_size, lambda info=info: file.open(info))  # type: ignore[misc]
    return members


def _of_tar(path: Path, tar: tarfile.TarFile) -> Members:
    members = {}
    for info in tar:
        name = _inside(path, info.name)
        if info.issym() or info.islnk():
            _inside(path, info.linkname)
        elif info.isreg():
            members[name] = Member(info.size, lambda info=info: _opened(tar, info))  # type: ignore[misc]
    return members


def _opened(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    opened = tar.extractfile(info)
    assert opened, "only regular files are members"
    return opened


def _inside(path: Path, name: str) -> PurePosixPath:
    if manifest.leads_out(name):
        raise ReleaseError(f"{path}: {name!r} leads out of the archive: nothing of it was unpacked")
    return PurePosixPath(name)
