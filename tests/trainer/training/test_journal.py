"""journal: a resumed run tells its story once."""

from __future__ import annotations

from pathlib import Path

from trainer.facts import LossPoint
from trainer.training.journal import Journal


def test_a_resumed_run_forgets_what_lies_after_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = Journal(file, 0)
    for step in (1, 2, 3):
        first.write(step, loss=float(step), wall_s=10.0 * step)
    first.write(2, valid_loss=9.0)
    with file.open("a") as handle:
        handle.write('{"step": 4, "lo')  # torn by a crash
    again = Journal(file, 2)
    assert again.points("loss") == (LossPoint(step=1, loss=1.0), LossPoint(step=2, loss=2.0))
    assert again.points("valid_loss") == (LossPoint(step=2, loss=9.0),)
    assert again.wall_s == 20.0
    assert len(file.read_text().splitlines()) == 3


def test_without_a_checkpoint_the_journal_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    Journal(file, 0).write(1, loss=1.0)
    assert Journal(file, 0).points("loss") == () and file.read_text() == ""
