"""metrics.jsonl: one line a log event. A resumed run first forgets the lines that lie after its checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.artifacts import write_whole
from trainer.facts import LossPoint


class Journal:
    def __init__(self, file: Path, resumed_step: int) -> None:
        """Keep what was measured up to resumed_step (0: nothing was)."""
        self._file = file
        known = _lines(file) if file.exists() and resumed_step else []
        self._events = [event for event in known if event["step"] <= resumed_step]
        write_whole(file, "".join(json.dumps(event) + "\n" for event in self._events).encode())

    def write(self, step: int, **figures: float | None) -> None:
        event = {"step": step, **figures}
        self._events.append(event)
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event) + "\n")

    def touch(self) -> None:
        """A sign of life, for whoever watches the file."""
        os.utime(self._file)

    @property
    def wall_s(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return max((event["wall_s"] for event in self._events if "wall_s" in event), default=0.0)

    def last_step(self, figure: str) -> int:
        """0 where it was never measured."""
        return max((event["step"] for event in self._events if figure in event), default=0)

    def points(self, figure: str) -> tuple[LossPoint, ...]:
        """The course of `loss` or `valid_loss`."""
        return tuple(LossPoint(step=event["step"], loss=event[figure]) for event in self._events if figure in event)


def _lines(file: Path) -> list[Mapping[str, Any]]:
    """Every whole line; the last one may be torn by a crash."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]
