from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server import manifest
from server.errors import ReleaseError
from server.release import archive
from tests.server.real import CONTRACT
from tests.server.scripted import small_release


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return small_release(tmp_path)


def edit(directory: Path, change: Callable[[Any], Any]) -> None:
    path = directory / "manifest.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def refusal(directory: Path) -> str:
    with pytest.raises(ReleaseError) as caught:
        manifest.read(directory)
    return str(caught.value)


def test_a_whole_release_is_read_with_its_probes(directory: Path) -> None:
    release = manifest.read(directory)
    assert release.model == "trinity:small-0123456789ab"
    assert release.gguf == directory / "model.gguf"
    assert release.probes[2].conversation[1].role == "assistant"


@pytest.mark.parametrize("name", ["manifest.json", "manifest_future.json"])
def test_the_golden_manifests_are_read_and_what_a_newer_trainer_adds_is_ignored(name: str) -> None:
    golden = manifest.Manifest.model_validate_json((CONTRACT / name).read_text(encoding="utf-8"))
    assert (golden.name, golden.prompt.stop, golden.prompt.num_ctx) == ("trinity", ("<end_of_turn>",), 4096)


def test_a_gguf_changed_by_one_byte_is_refused(directory: Path) -> None:
    path = directory / "model.gguf"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    assert "model.gguf was changed after its release" in refusal(directory)


def test_missing_and_shortened_files_are_all_named_at_once(directory: Path) -> None:
    (directory / "model.gguf").unlink()
    (directory / "probes.jsonl").write_text("")
    message = refusal(directory)
    assert "model.gguf is missing" in message and "probes.jsonl has 0 bytes" in message


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(directory: Path) -> None:
    edit(directory, lambda tree: tree["files"]["gguf"].update(path="x" * 300))
    assert "cannot be read (File name too long)" in refusal(directory)


def test_an_unknown_schema_version_is_refused_with_the_remedy(directory: Path) -> None:
    edit(directory, lambda tree: tree.update(schema_version=2))
    assert "schema_version is 2 and this server reads 1: update the server" in refusal(directory)


def test_a_torn_manifest_and_a_wrong_type_are_each_one_line(directory: Path) -> None:
    edit(directory, lambda tree: tree["prompt"].update(num_ctx="many"))
    assert "prompt.num_ctx" in refusal(directory) and "many" in refusal(directory)
    path = directory / "manifest.json"
    path.write_text(path.read_text()[:100])
    assert "not valid JSON" in refusal(directory) and "\n" not in refusal(directory)


def without(name: str) -> Callable[[Any], None]:
    return lambda tree: tree["files"].pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("gguf"), "files: names no gguf"),
        (without("probes"), "files: names no probes"),
        (lambda tree: tree.update(created="2030-01-01T00:00:00"), "created: Input should have timezone info"),
        (lambda tree: tree["files"]["gguf"].update(path="a\0b"), "files.gguf.path"),
    ],
)
def test_what_would_break_a_list_of_releases_is_refused_and_left_out_of_it(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    good, bad = small_release(tmp_path, "good-0123456789ab"), small_release(tmp_path, "bad-0123456789ab")
    (tmp_path / "current").unlink()
    edit(bad, change)
    assert said in refusal(bad)
    assert manifest.find(tmp_path) == good


def test_a_manifest_nested_without_end_and_probes_in_no_encoding_are_refused(directory: Path) -> None:
    probes = directory / "probes.jsonl"
    probes.write_bytes(b"\xff\xfe" + probes.read_bytes())
    edit(directory, lambda tree: tree["files"]["probes"].update(num_bytes=probes.stat().st_size, sha256=manifest.sha256(probes)))
    assert "probes.jsonl: Invalid JSON" in refusal(directory)
    (directory / "manifest.json").write_text("[" * 200_000)
    assert "not valid JSON" in refusal(directory)


def test_an_archive_that_was_replaced_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "r.tar"
    path.write_bytes(b"one")
    before = manifest.stamp(path)
    assert manifest.stamp(path) == before
    path.write_bytes(b"another")
    assert manifest.stamp(path) != before


def test_a_path_that_leads_out_of_the_release_is_refused(directory: Path) -> None:
    edit(directory, lambda tree: tree["files"]["gguf"].update(path="../model.gguf"))
    assert "leads out of the release" in refusal(directory)


def test_a_release_is_found_by_the_link_or_named_itself(tmp_path: Path) -> None:
    assert manifest.find(tmp_path) is None
    directory = small_release(tmp_path)
    assert manifest.find(tmp_path) == manifest.find(directory) == manifest.find(tmp_path / "current") == directory
    shutil.rmtree(directory)
    assert manifest.find(tmp_path) is None
    directory.mkdir()
    with pytest.raises(ReleaseError, match="has no manifest"):
        manifest.find(tmp_path)


@contextmanager
def somebody_else() -> Iterator[None]:
    """Root may read everything: its tests look as nobody."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("closed", [".", "small-0123456789ab", "small-0123456789ab/manifest.json"])
def test_a_release_that_may_not_be_read_is_one_line_with_the_remedy_and_a_change_of_that_is_seen(closed: str, link: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be entered by its owner alone
        Path(folder).chmod(0o755)
        releases = Path(folder) / "gguf"
        small_release(releases)
        if not link:
            (releases / "current").unlink()
        path = releases / closed
        open_mode = path.stat().st_mode
        path.chmod(0)
        with somebody_else():
            before = manifest.stamp(releases)
            for find in (archive.find, lambda releases: manifest.read(manifest.find(releases) or releases)):
                with pytest.raises(ReleaseError, match=r"cannot be read.*chmod -R a.rX") as caught:
                    find(releases)
                assert "\n" not in str(caught.value)
        path.chmod(open_mode)
        with somebody_else():
            assert archive.find(releases)
            assert manifest.stamp(releases) != before


def test_without_the_link_the_newest_whole_release_is_found_and_a_torn_one_is_not(tmp_path: Path) -> None:
    """Drive and Windows lose links, or make a file of them."""
    for name, moment in (("a-0123456789ab", "2027-01-01T00:00:00Z"), ("b-0123456789ab", "2026-12-01T00:00:00Z")):
        edit(small_release(tmp_path, name), created(moment))
    torn = small_release(tmp_path, "c-0123456789ab")
    edit(torn, created("2028-01-01T00:00:00Z"))
    (torn / "model.gguf").unlink()
    (tmp_path / "current").unlink()
    assert manifest.find(tmp_path) == tmp_path / "a-0123456789ab"
    (tmp_path / "current").write_text("c-0123456789ab")
    assert manifest.find(tmp_path) == tmp_path / "a-0123456789ab"
    before = manifest.stamp(tmp_path)
    (torn / "model.gguf").write_bytes(b"GGUF and nothing else")
    assert manifest.stamp(tmp_path) != before
    assert manifest.find(tmp_path) == torn


def created(moment: str) -> Callable[[Any], None]:
    return lambda tree: tree.update(created=moment)


def test_a_release_whose_name_is_a_path_is_refused(directory: Path) -> None:
    edit(directory, lambda tree: tree.update(release="../evil"))
    assert "release: String should match pattern" in refusal(directory)


def test_the_base_models_terms_are_found_without_hashing_and_their_absence_is_no_error(directory: Path) -> None:
    (directory / "model.gguf").unlink()
    assert manifest.terms(directory) == ["Gemma Terms of Use, https://ai.google.dev/gemma/terms"]
    edit(directory, lambda tree: tree.update(licences="MIT"))
    assert manifest.terms(directory) == []
    assert manifest.terms(directory / "nowhere") == []
