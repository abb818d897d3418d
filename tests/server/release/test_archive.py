"""Releases packed as people pack them, and archives as nobody honest packs them."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from server import manifest
from server.errors import ReleaseError
from server.release import archive
from tests.server.scripted import small_release

NAME = "small-0123456789ab"
Pack = Callable[[Path, Path], Path]


def zipped(folder: Path, target: Path) -> Path:
    path = target.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for item in sorted(folder.rglob("*")):
            file.write(item, item.relative_to(folder))
    return path


def tarred(folder: Path, target: Path) -> Path:
    path = target.with_suffix(".tar")
    with tarfile.open(path, "w") as file:
        file.add(folder, arcname=".")
    return path


def gzipped(folder: Path, target: Path) -> Path:
    path = target.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, arcname=".")
    return path


PACKS = pytest.mark.parametrize("pack", [zipped, tarred, gzipped])


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path / "gguf", NAME)
    return tmp_path / "gguf"


def created(directory: Path, moment: str) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created": moment}))


@PACKS
def test_a_packed_release_is_unpacked_whole_and_reads_as_the_one_that_was_packed(pack: Pack, releases: Path, tmp_path: Path) -> None:
    path = pack(releases / NAME, tmp_path / "r")
    directory = archive.unpack(path, tmp_path / "into")
    assert directory == tmp_path / "into" / NAME
    assert manifest.read(directory).manifest == manifest.read(releases / NAME).manifest
    assert archive.unpack(path, tmp_path / "into") == directory, "a second time is the same again"
    assert [item.name for item in (tmp_path / "into").iterdir()] == [NAME]


@PACKS
def test_of_a_packed_directory_of_releases_with_its_link_the_newest_whole_one_is_taken(pack: Pack, releases: Path, tmp_path: Path) -> None:
    created(small_release(releases, "newer-0123456789ab"), "2027-01-01T00:00:00Z")
    torn = small_release(releases, "newest-0123456789ab")
    created(torn, "2028-01-01T00:00:00Z")
    (torn / "model.gguf").unlink()
    assert archive.look(pack(releases, tmp_path / "all")).manifest.release == "newer-0123456789ab"


@PACKS
def test_an_archive_without_a_whole_release_says_what_is_missing(pack: Pack, releases: Path, tmp_path: Path) -> None:
    (releases / NAME / "probes.jsonl").write_text("")
    with pytest.raises(ReleaseError, match=r"probes.jsonl has 0 bytes, not \d+: pack the release whole"):
        archive.look(pack(releases / NAME, tmp_path / "r"))
    (releases / NAME / "manifest.json").unlink()
    with pytest.raises(ReleaseError, match=r"holds no manifest\.json"):
        archive.look(pack(releases / NAME, tmp_path / "r"))


def test_backslashes_of_windows_are_folders(releases: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.zip"
    with zipfile.ZipFile(path, "w") as file:
        for item in (releases / NAME).iterdir():
            file.write(item, f"gguf\\{NAME}\\{item.name}")
    assert manifest.read(archive.unpack(path, tmp_path / "into"))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil", "\\\\host\\evil"])
def test_a_name_that_leads_out_refuses_the_whole_archive_and_writes_nothing(name: str, releases: Path, tmp_path: Path) -> None:
    packed, tar = zipped(releases / NAME, tmp_path / "r"), tarred(releases / NAME, tmp_path / "r")
    with zipfile.ZipFile(packed, "a") as file:
        file.writestr(name, b"x")
    with tarfile.open(tar, "a") as file_:
        file_.addfile(tarfile.TarInfo(name))
    before = sorted(tmp_path.rglob("*"))
    for path in (packed, tar):
        with pytest.raises(ReleaseError, match="leads out of the archive"):
            archive.unpack(path, tmp_path / "into" / "deep")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["/etc/passwd", "../../x"])
def test_a_link_that_leads_out_refuses_the_archive(target: str, releases: Path, tmp_path: Path) -> None:
    packed, tar = zipped(releases / NAME, tmp_path / "r"), tarred(releases / NAME, tmp_path / "r")
    with zipfile.ZipFile(packed, "a") as file:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, target)
    with tarfile.open(tar, "a") as file_:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, target
        file_.addfile(info)
    for path in (packed, tar):
        with pytest.raises(ReleaseError, match="leads out of the archive"):
            archive.look(path)


def test_a_link_in_the_place_of_a_file_is_not_followed(releases: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.tar"
    with tarfile.open(path, "w") as file:
        for item in (releases / NAME).iterdir():
            if item.name != "model.gguf":
                file.add(item, arcname=item.name)
        info = tarfile.TarInfo("model.gguf")
        info.type, info.linkname = tarfile.SYMTYPE, "Modelfile"
        file.addfile(info)
    with pytest.raises(ReleaseError, match=r"model.gguf is not in the archive"):
        archive.unpack(path, tmp_path / "into")


def test_no_more_bytes_are_written_than_the_manifest_says(releases: Path, tmp_path: Path) -> None:
    """A member that unpacks to more than it says is a bomb."""
    path = tmp_path / "r.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for item in (releases / NAME).iterdir():
            file.writestr(item.name, bytes(50_000_000) if item.name == "model.gguf" else item.read_bytes())
    size = (releases / NAME / "model.gguf").stat().st_size
    content = path.read_bytes().replace((50_000_000).to_bytes(4, "little"), size.to_bytes(4, "little"))
    path.write_bytes(content)
    with pytest.raises(ReleaseError):
        manifest.read(archive.unpack(path, tmp_path / "into"))
    assert sum(item.stat().st_size for item in (tmp_path / "into").rglob("*")) < 1_000_000


@PACKS
def test_a_torn_archive_is_one_line_and_leaves_no_release(pack: Pack, releases: Path, tmp_path: Path) -> None:
    path = pack(releases / NAME, tmp_path / "r")
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 4, len(whole) // 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ReleaseError) as caught:
            manifest.read(archive.unpack(path, tmp_path / "into"))
        assert "\n" not in str(caught.value)


def test_what_is_called_an_archive_and_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "r.zip"
    path.write_bytes(io.BytesIO(b"PK\x05\x06" + bytes(40)).getvalue())
    with pytest.raises(ReleaseError):
        archive.look(path)


def test_names_in_no_encoding_and_a_torn_lzma_are_one_line(releases: Path, tmp_path: Path) -> None:
    name = tmp_path / "name.zip"
    with zipfile.ZipFile(name, "w") as file:
        file.writestr("é/manifest.json", "{}")
    name.write_bytes(name.read_bytes().replace("é".encode(), b"\xff\xfe"))
    torn = tmp_path / "torn.zip"
    with zipfile.ZipFile(torn, "w", zipfile.ZIP_LZMA) as file:
        file.write(releases / NAME / "manifest.json", "manifest.json")
    content = bytearray(torn.read_bytes())
    content[60:100] = bytes(40)
    torn.write_bytes(content)
    for path in (name, torn):
        with pytest.raises(ReleaseError, match="cannot be unpacked"):
            archive.look(path)


def test_current_is_found_first_and_without_it_the_newest_whole_of_directories_and_archives(releases: Path, tmp_path: Path) -> None:
    newer = small_release(tmp_path / "elsewhere", "newer-0123456789ab")
    created(newer, "2027-01-01T00:00:00Z")
    packed = zipped(newer, releases / "newer")
    assert archive.find(releases) == (releases / NAME, manifest.parse(releases / NAME / "manifest.json"))
    (releases / "current").unlink()
    found = archive.find(releases)
    assert found and found.path == packed
    (releases / "broken.zip").write_bytes(b"PK")
    packed.write_bytes(packed.read_bytes()[:50])
    found = archive.find(releases)
    assert found and found.path == releases / NAME
    assert [item.path.name for item in archive.listed(releases)] == [NAME]
    assert archive.find(tmp_path / "nowhere") is None
