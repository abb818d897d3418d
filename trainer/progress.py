"""What the person sees while waiting: a bar with the time left on a terminal, a plain line every few seconds in a log.

with progress.task("train", total=100, unit="steps") as task:
    task.advance(loss=1.23, tokens_per_s=512)
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_S = 5.0
"""Least time between two lines of a task in a log."""


class Task(Protocol):
    def advance(self, n: float = 1, **figures: float | str) -> None:
        """n more units are done; figures replace those of the same name that are shown beside the count."""


def say(line: str) -> None:
    """One line for the person. Inside a task on a terminal it appears above the bar."""
    print(line, flush=True)


@contextmanager
def task(label: str, total: float | None, unit: str = "") -> Iterator[Task]:
    """A piece of work of `total` units; None where nobody knows how many."""
    if sys.stdout.isatty():
        with _bar() as bar:
            yield Bar(bar, label, total, unit)
    else:
        lines = Lines(label, total, unit, sys.stdout)
        try:
            yield lines
        finally:
            lines.end()


class Lines:
    """A task in a log: a line when EVERY_S have passed, and one at the end, whatever the end was."""

    def __init__(self, label: str, total: float | None, unit: str, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._out, self._clock = out, clock
        self._started = self._shown = clock()
        self._done = 0.0
        self._figures: dict[str, float | str] = {}

    def advance(self, n: float = 1, **figures: float | str) -> None:
        self._done += n
        self._figures |= figures
        now = self._clock()
        if now - self._shown >= EVERY_S:
            self._shown = now
            self._print(f"{duration(self._left_s(now))} left" if self._total and self._done else "")

    def end(self) -> None:
        self._print(f"{duration(self._clock() - self._started)} taken")

    def _left_s(self, now: float) -> float:
        assert self._total is not None
        return max(0.0, self._total - self._done) * (now - self._started) / self._done

    def _print(self, when: str) -> None:
        parts = (share(self._done, self._total, self._unit), when, shown(self._figures))
        print(f"{self._label}: {', '.join(part for part in parts if part)}", file=self._out, flush=True)


class Bar:
    """A task on a terminal, drawn by rich."""

    def __init__(self, bar: Progress, label: str, total: float | None, unit: str) -> None:
        self._bar = bar
        self._id = bar.add_task(label, total=total, unit=unit, figures="")
        self._figures: dict[str, float | str] = {}

    def advance(self, n: float = 1, **figures: float | str) -> None:
        self._figures |= figures
        self._bar.update(self._id, advance=n, figures=shown(self._figures))


def _bar() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # 0.2 s

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )


def share(done: float, total: float | None, unit: str) -> str:
    """`40 of 100 steps (40 %)`, or `40 steps` where nobody knows how many there are."""
    count = number(done) if total is None else f"{number(done)} of {number(total)}"
    percent = f" ({min(1.0, done / total):.0%})".replace("%", " %") if total else ""
    return f"{count} {unit}".rstrip() + percent


def shown(figures: dict[str, float | str]) -> str:
    """`loss 1.234, tokens/s 5,120`: a keyword's `_per_` reads as a slash."""
    return ", ".join(f"{name.replace('_per_', '/').replace('_', ' ')} {number(value)}" for name, value in figures.items())


def number(value: float | str) -> str:
    """Four significant digits, whole numbers and thousands written out; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() or 1000 <= abs(value) < math.inf else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`8 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
