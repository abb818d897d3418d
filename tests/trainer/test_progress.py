from __future__ import annotations

import io
import math
import os
import pty
import subprocess
import sys

import pytest

from trainer import progress
from trainer.progress import Lines

DEMO = """
from trainer import progress
with progress.task("train", 3, "steps") as task:
    for step in range(3):
        task.advance(loss=1.5 / (step + 1), tokens_per_s=5120.4)
        progress.say(f"step {step} [kept]")
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_at_most_every_five_seconds_and_one_at_the_end() -> None:
    out, clock = io.StringIO(), Clock()
    lines = Lines("train", 100, "steps", out, clock)
    for _ in range(100):
        clock.now += 0.12
        lines.advance(loss=clock.now)
    lines.end()
    shown = out.getvalue().splitlines()
    assert len(shown) == 3
    assert shown[0] == "train: 42 of 100 steps (42 %), 7 s left, loss 5.04"
    assert shown[-1] == "train: 100 of 100 steps (100 %), 12 s taken, loss 12"


def test_work_of_unknown_size_has_no_percent_and_no_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    lines = Lines("read", None, "records", out, clock)
    clock.now = 6.0
    lines.advance(1500)
    assert out.getvalue() == "read: 1,500 records\n"


def test_a_task_that_fails_still_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress.task("export", 4, "tensors") as task:
        task.advance()
        raise ZeroDivisionError
    assert capsys.readouterr().out == "export: 1 of 4 tensors (25 %), 0 s taken\n"


def test_an_empty_task_is_no_division_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("nothing", 0):
        pass
    assert capsys.readouterr().out == "nothing: 0 of 0, 0 s taken\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.0, "0"),
        (1.23456, "1.235"),
        (2e-4, "0.0002"),
        (51200.7, "51,201"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("best", "best"),
    ],
)
def test_numbers_are_short_and_whole_ones_whole(value: float | str, text: str) -> None:
    assert progress.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_a_terminal_gets_a_bar_with_figures_and_lines_above_it() -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    subprocess.run([sys.executable, "-c", DEMO], stdout=child, stderr=subprocess.STDOUT, env=environment, check=True, timeout=60)
    os.close(child)
    shown = _drain(parent)
    assert "100%" in shown
    assert "3/3" in shown
    assert "loss 0.5, tokens/s 5,120" in shown
    assert "step 2 [kept]" in shown


def test_importing_it_does_not_import_rich() -> None:
    probe = "import sys, trainer.progress; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60)


def _drain(descriptor: int) -> str:
    """What a terminal has received until its other end closed (Linux says EIO then)."""
    chunks = []
    try:
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return b"".join(chunks).decode()
