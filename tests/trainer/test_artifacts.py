from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from trainer import artifacts
from trainer.artifacts import Hashes, Label
from trainer.errors import EditedError, LockedError, TornError
from trainer.facts import ReportFacts

FACTS = ReportFacts(html_bytes=3)


def label(**sections: object) -> Label:
    return Label(stage="report", version=1, sections=dict(sections), sources={"data": "aa"}, inputs={})


@pytest.fixture
def hashes(tmp_path: Path) -> Hashes:
    return Hashes(tmp_path / "hashes.json")


def make(target: Path, hashes: Hashes, content: str = "abc", made: Label | None = None) -> None:
    with artifacts.publish(target, made or label(), hashes) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "page").write_text(content)
        draft.facts = FACTS


def test_what_is_published_reads_back_with_its_facts_and_label(tmp_path: Path, hashes: Hashes) -> None:
    make(tmp_path / "report", hashes)
    artifact = artifacts.read(tmp_path / "report", ReportFacts, hashes)
    assert artifact and artifact.facts == FACTS and artifact.label == label() and artifact.key == label().key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]


def test_absent_is_none(tmp_path: Path, hashes: Hashes) -> None:
    assert artifacts.read(tmp_path / "report", ReportFacts, hashes) is None


def test_a_failed_stage_leaves_the_old_one_whole(tmp_path: Path, hashes: Hashes) -> None:
    make(tmp_path / "report", hashes, "old")
    with pytest.raises(ZeroDivisionError), artifacts.publish(tmp_path / "report", label(a=1), hashes) as draft:
        (draft.path / "page").write_text("half")
        raise ZeroDivisionError
    artifacts.recover(tmp_path)
    artifact = artifacts.read(tmp_path / "report", ReportFacts, hashes)
    assert artifact and artifact.label == label() and (tmp_path / "report" / "sub" / "page").read_text() == "old"


def test_one_changed_byte_is_edited_and_a_missing_file_is_torn(tmp_path: Path, hashes: Hashes) -> None:
    make(tmp_path / "report", hashes)
    page = tmp_path / "report" / "sub" / "page"
    page.write_text("abd")
    with pytest.raises(EditedError, match="page"):
        artifacts.read(tmp_path / "report", ReportFacts, hashes)
    page.unlink()
    with pytest.raises(TornError, match="page"):
        artifacts.read(tmp_path / "report", ReportFacts, hashes)
    (tmp_path / "report" / artifacts.RECORD).unlink()
    with pytest.raises(TornError, match="not published whole"):
        artifacts.read(tmp_path / "report", ReportFacts, hashes)


def test_an_edited_record_is_refused(tmp_path: Path, hashes: Hashes) -> None:
    make(tmp_path / "report", hashes)
    record = tmp_path / "report" / artifacts.RECORD
    record.write_text(record.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(EditedError, match="key does not fit"):
        artifacts.read(tmp_path / "report", ReportFacts, hashes)


def test_recover_publishes_a_whole_partial_and_else_brings_the_old_one_back(tmp_path: Path, hashes: Hashes) -> None:
    make(tmp_path / "report", hashes, "old")
    (tmp_path / "report").rename(tmp_path / "report.old")
    artifacts.recover(tmp_path)
    assert (tmp_path / "report" / "sub" / "page").read_text() == "old"

    make(tmp_path / "elsewhere", hashes, "new")
    (tmp_path / "report").rename(tmp_path / "report.old")
    (tmp_path / "elsewhere").rename(tmp_path / "report.partial")
    artifacts.recover(tmp_path)
    assert (tmp_path / "report" / "sub" / "page").read_text() == "new"
    assert not (tmp_path / "report.old").exists()


def test_a_draft_is_resumed_only_under_its_own_label(tmp_path: Path, hashes: Hashes) -> None:
    target = tmp_path / "report"
    for resumed, made in ((False, label()), (True, label()), (False, label(a=1))):
        with pytest.raises(ZeroDivisionError), artifacts.publish(target, made, hashes, resume=True) as draft:
            assert (draft.path / "checkpoint").exists() == resumed
            (draft.path / "checkpoint").write_text("x")
            (draft.path / "best.new").mkdir(exist_ok=True)  # a kill amid a write of the stage's own
            raise ZeroDivisionError
    assert artifacts.draft_label(target) == label(a=1)


def test_keys_change_with_anything_that_decides_the_output() -> None:
    other = label().model_copy(update={"version": 2})
    outer = [Label(stage="x", version=1, sections={}, sources={}, inputs={"report": inner}) for inner in (label(), other)]
    keys = {
        label().key,
        label(a=1).key,
        other.key,
        label().model_copy(update={"sources": {"data": "bb"}}).key,
        *(item.key for item in outer),
    }
    assert len(keys) == 6
    assert outer[0].differences(outer[1]) == ["report: code version 1 -> 2"]
    assert label(a=1).differences(label(a=2)) == ["a: 1 -> 2"]


def test_hashes_are_remembered_until_size_or_time_changes(tmp_path: Path, hashes: Hashes) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    first = hashes.of(path)
    hashes.save()
    again = Hashes(tmp_path / "hashes.json")
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert again.of(path) == first  # same size and time: taken from the memo, not read
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert again.of(path) != first


def test_a_second_trainer_on_the_same_run_is_refused(tmp_path: Path) -> None:
    with artifacts.lock(tmp_path / "run"), pytest.raises(LockedError, match=r"run\.name"), artifacts.lock(tmp_path / "run"):
        pass
    with artifacts.lock(tmp_path / "run"):
        pass


def test_a_release_appears_whole_and_current_moves_to_it(tmp_path: Path, hashes: Hashes) -> None:
    make(tmp_path / "report", hashes)
    root = tmp_path / "gguf"
    for name in ("run-1", "run-2", "run-2"):
        artifacts.expose(tmp_path / "report", root, name)
        assert (root / "current").resolve() == root / name
        assert (root / name / "sub" / "page").stat().st_ino == (tmp_path / "report" / "sub" / "page").stat().st_ino
    assert sorted(path.name for path in root.iterdir()) == ["current", "run-1", "run-2"]


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_whole(tmp_path: Path, hashes: Hashes) -> None:
    """Children publish over and over and are killed after 1 to 30 ms; whatever is there then must read as whole. Thirty are enough on a
    machine with time; a busy one may need more until some have published."""
    seen: set[tuple[int, int]] = set()
    for trial in range(300):
        if trial >= 30 and len(seen) > 5:
            break
        begun = tmp_path / f"begun {trial}"
        child = os.fork()
        if child == 0:
            begun.touch()
            for number in range(1000):
                make(tmp_path / "report", hashes, f"{trial} {number}", label(trial=trial, number=number))
            os._exit(0)
        while not begun.exists():  # a fork of a large process takes its time
            time.sleep(0.0005)
        time.sleep(0.001 * (trial % 30 + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        artifacts.recover(tmp_path)
        artifact = artifacts.read(tmp_path / "report", ReportFacts, Hashes(tmp_path / "none.json"))
        if artifact:
            trial_of, number_of = artifact.label.sections["trial"], artifact.label.sections["number"]
            assert (artifact.path / "sub" / "page").read_text() == f"{trial_of} {number_of}"
            seen.add((trial_of, number_of))
    assert len(seen) > 5


def test_a_crash_while_hashing_leaves_a_draft_that_is_known_by_its_label(tmp_path: Path) -> None:
    class Crashing(Hashes):
        def of(self, path: Path) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), artifacts.publish(tmp_path / "report", label(), Crashing(tmp_path / "memo.json")) as draft:
        (draft.path / "report.html").write_text("x", encoding="utf-8")
        draft.facts = FACTS
    assert artifacts.draft_label(tmp_path / "report") == label()


def test_what_a_stage_keeps_while_unfinished_goes_when_it_is_published_and_not_before(tmp_path: Path, hashes: Hashes) -> None:
    target = tmp_path / "report"
    with artifacts.publish(target, label(), hashes) as draft:
        (draft.path / artifacts.SCRATCH).mkdir()
        (draft.path / artifacts.SCRATCH / "weights").write_text("x")
        (draft.path / "page").write_text("y")
        draft.facts = FACTS
    assert sorted(path.name for path in target.iterdir()) == [artifacts.RECORD, "page"]
    assert artifacts.read(target, ReportFacts, hashes) is not None
