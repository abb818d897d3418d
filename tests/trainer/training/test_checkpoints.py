"""checkpoints: what a crash leaves is never taken for a whole one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import MachineError, StaleError
from trainer.training import checkpoints
from trainer.training.checkpoints import Origin, Schedule

ORIGIN = Origin(key="k", base_sha256="b", rank=4, dora=True)


def write(directory: Path, text: str = "x") -> Path:
    directory.mkdir(parents=True)
    (directory / "file").write_text(text)
    return directory


def sealed(directory: Path, *steps: int, keep: int = 9, origin: Origin = ORIGIN) -> list[Path]:
    return [checkpoints.seal(write(directory / "partial" / f"checkpoint-{step}"), directory, keep, origin) for step in steps]


def test_checkpoints_are_ordered_by_steps_not_by_name(tmp_path: Path) -> None:
    sealed(tmp_path, 25, 50, 100)
    write(tmp_path / "checkpoint-999.gone")
    found = checkpoints.newest(tmp_path, ORIGIN)
    assert found is not None and checkpoints.step_of(found) == 100
    assert checkpoints.newest(tmp_path / "nowhere", ORIGIN) is None


def test_a_clock_that_was_set_back_changes_nothing(tmp_path: Path) -> None:
    """The newest by steps has the oldest times, on itself and on its files; it is taken, and it is not what goes."""
    for step in (1, 2, 3):
        (made,) = sealed(tmp_path, step, keep=2)
        for path in (*made.iterdir(), made):
            os.utime(path, (1e9 - 1e6 * step, 1e9 - 1e6 * step))
    assert [path.name for path in checkpoints.every(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert checkpoints.newest(tmp_path, ORIGIN) == tmp_path / "checkpoint-3"


def test_sealing_keeps_the_newest(tmp_path: Path) -> None:
    sealed(tmp_path, 1, 2, 3, keep=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_is_not_whole_never_pushes_out_what_is(tmp_path: Path, keep: int) -> None:
    """The training went on from step 50, since 75 and 100 were torn; step 60 is then the newest."""
    sealed(tmp_path / "checkpoints", 50, 75, 100)
    sealed(tmp_path / "checkpoints", 60, keep=keep)
    assert [path.name for path in checkpoints.every(tmp_path / "checkpoints")] == ["checkpoint-50", "checkpoint-60"][-keep:]


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing", "no record", "half a record"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, torn = sealed(tmp_path, 1, 2)
    file, record = torn / "file", torn / checkpoints.RECORD
    harms: dict[str, Callable[[], object]] = {
        "flipped": lambda: file.write_text("y"),
        "cut": lambda: file.write_text(""),
        "missing": file.unlink,
        "no record": record.unlink,
        "half a record": lambda: record.write_bytes(record.read_bytes()[:40]),
    }
    harms[harm]()
    assert checkpoints.newest(tmp_path, ORIGIN) == good
    assert "checkpoint-2 is not whole" in capsys.readouterr().out
    checkpoints.seal(write(tmp_path / "partial" / "checkpoint-2"), tmp_path, 9, ORIGIN)
    assert checkpoints.newest(tmp_path, ORIGIN) == torn, "made anew in its place"


def test_a_checkpoint_of_another_training_is_refused_with_the_difference(tmp_path: Path) -> None:
    sealed(tmp_path, 1)
    with pytest.raises(StaleError, match=r"checkpoint-1 is a state of another training:\n  base_sha256: b -> c\n  rank: 4 -> 8\ndelete "):
        checkpoints.newest(tmp_path, Origin(key="k", base_sha256="c", rank=8, dora=True))


def test_minutes_alone_ask_for_a_checkpoint() -> None:
    now = [1000.0]
    schedule = Schedule(2.0, lambda: now[0])
    assert not schedule.due()
    now[0] += 119.0
    assert not schedule.due()
    now[0] += 1.0
    assert schedule.due() and schedule.due()
    schedule.saved()
    assert not schedule.due()


def test_half_written_directories_are_cleared_away(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints" / "partial" / "checkpoint-4")
    write(tmp_path / "checkpoints" / "checkpoint-2.gone")
    write(tmp_path / "restoring")
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


def test_a_write_that_failed_says_what_is_kept_and_leaves_nothing_half(tmp_path: Path) -> None:
    """torch's own words for a full disk name no cause."""
    sealed(tmp_path / "checkpoints", 4)
    write(tmp_path / "checkpoints" / "partial" / "checkpoint-5")
    with pytest.raises(MachineError, match=r"step 4 is kept.*the same command goes on"), checkpoints.writing(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), checkpoints.writing(tmp_path):
        raise RuntimeError("a bug")
    with pytest.raises(ConnectionResetError), checkpoints.writing(tmp_path):
        raise ConnectionResetError(104, "a tracker's network")
