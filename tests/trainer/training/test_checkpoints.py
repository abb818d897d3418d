"""checkpoints: what a crash leaves is never taken for a whole one."""

from __future__ import annotations

from pathlib import Path

from trainer.training import checkpoints


def write(directory: Path, text: str = "x") -> Path:
    directory.mkdir(parents=True)
    (directory / "file").write_text(text)
    return directory


def test_checkpoints_are_ordered_by_steps_not_by_name(tmp_path: Path) -> None:
    for step in (100, 25, 50):
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / "checkpoint-999.old")
    found = checkpoints.newest(tmp_path)
    assert found is not None and checkpoints.step_of(found) == 100
    assert checkpoints.newest(tmp_path / "nowhere") is None


def test_sealing_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoints.seal(write(tmp_path / "partial" / f"checkpoint-{step}"), tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_half_written_directories_are_cleared_away(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints" / "partial" / "checkpoint-4")
    write(tmp_path / "best.new")
    write(tmp_path / "best", "good")
    checkpoints.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_crash_between_two_renames_brings_the_old_directory_back(tmp_path: Path) -> None:
    write(tmp_path / "best.old", "old")
    write(tmp_path / "best.new", "new")
    checkpoints.tidy(tmp_path)
    assert (tmp_path / "best" / "file").read_text() == "old"


def test_replace_leaves_the_new_one_alone(tmp_path: Path) -> None:
    write(tmp_path / "best", "old")
    checkpoints.replace(write(tmp_path / "best.new", "new"), tmp_path / "best")
    assert (tmp_path / "best" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
