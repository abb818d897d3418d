"""Whether a training still makes steps, seen from outside by the file that each step writes to.

metrics.jsonl is begun anew when the model is loaded, so that downloads and quantising, however long, are no stuck step. Time is
the machine's monotonic clock: a clock that is set and a laptop that slept are no stuck step either.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

STEPS = 20
"""As many of the longest step so far are waited for, where that is longer than the least patience."""


class Watchdog:
    def __init__(self, metrics: Path, least_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """least_s: the least patience, seconds."""
        self._metrics, self._least_s, self._clock = metrics, least_s, clock
        self._before = self._seen = _mark(metrics)
        self._at = clock()

    def stuck_s(self) -> float | None:
        """Seconds without a sign of life where these are too many; None otherwise, and before training began."""
        mark = _mark(self._metrics)
        if mark != self._seen:
            self._seen, self._at = mark, self._clock()
        silent_s = self._clock() - self._at
        if self._seen == self._before or silent_s <= self._least_s:
            return None
        return silent_s if silent_s > STEPS * _longest_step_s(self._metrics) else None


def _mark(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def _longest_step_s(metrics: Path) -> float:
    """The last line may be half written."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return max((json.loads(line).get("step_s", 0.0) for line in lines if line), default=0.0)
