"""Entries of the cache are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer import cache
from trainer.errors import EditedError, MachineError, TornError


def made(target: Path, text: str = "content") -> cache.Entry:
    with cache.building(target, "entry.json", "key") as draft:
        (draft.path / "part").mkdir()
        (draft.path / "part" / "file").write_text(text)
        draft.notes["seen"] = 1
    entry = cache.find(target, "entry.json")
    assert entry is not None
    return entry


def test_an_entry_is_found_with_its_notes(tmp_path: Path) -> None:
    entry = made(tmp_path / "entry")
    assert (entry.key, entry.notes, list(entry.files)) == ("key", {"seen": 1}, ["part/file"])
    assert cache.verify(tmp_path / "entry", "entry.json") == entry


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), cache.building(tmp_path / "entry", "entry.json", "key") as draft:
        (draft.path / "file").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_failed_build_leaves_the_old_entry(tmp_path: Path) -> None:
    before = made(tmp_path / "entry")
    with pytest.raises(ZeroDivisionError), cache.building(tmp_path / "entry", "entry.json", "other"):
        raise ZeroDivisionError
    assert cache.find(tmp_path / "entry", "entry.json") == before


@pytest.mark.parametrize("damage", ["missing", "shorter", "no record", "half a record"])
def test_a_torn_entry_is_not_taken(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "entry"
    made(target)
    record = target / "entry.json"
    if damage == "missing":
        (target / "part" / "file").unlink()
    elif damage == "shorter":
        (target / "part" / "file").write_text("cont")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_bytes(record.read_bytes()[:40])
    assert cache.find(target, "entry.json") is None
    with pytest.raises(TornError, match="delete it"):
        cache.open_record(target, "entry.json")


def test_a_copy_with_other_times_is_hashed_and_taken(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    made(target)
    os.utime(target / "part" / "file", ns=(1, 1))
    assert cache.find(target, "entry.json") is not None
    (target / "part" / "file").write_text("CONTENT")
    assert cache.find(target, "entry.json") is None


def test_verify_finds_an_edit_that_kept_size_and_time(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    stamp = made(target).files["part/file"]
    (target / "part" / "file").write_text("CONTENT")
    os.utime(target / "part" / "file", ns=(stamp.mtime_ns, stamp.mtime_ns))
    assert cache.find(target, "entry.json") is not None
    with pytest.raises(EditedError, match="part/file: its content changed"):
        cache.verify(target, "entry.json")


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"the model takes 1000000000\.0 GB.*paths\.cache"):
        cache.need_room(tmp_path / "not" / "yet", 10**18, "the model")
    assert not list(tmp_path.iterdir())


def test_the_hash_depends_on_contents_only(tmp_path: Path) -> None:
    assert made(tmp_path / "a").sha256 == made(tmp_path / "b").sha256 != made(tmp_path / "c", "other").sha256
