from __future__ import annotations

import json
from pathlib import Path

from trainer.watchdog import Watchdog


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_loading_takes_as_long_as_it_takes_and_a_silent_training_does_not(tmp_path: Path) -> None:
    clock, metrics = Clock(), tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 9, "step_s": 5.0}\n')  # an earlier attempt's
    watchdog = Watchdog(metrics, 60.0, clock)
    clock.now_s = 1e6
    assert watchdog.stuck_s() is None, "downloads and quantising are no steps"
    metrics.write_text("")
    assert watchdog.stuck_s() is None
    clock.now_s += 59
    assert watchdog.stuck_s() is None
    clock.now_s += 2
    assert watchdog.stuck_s() == 61


def test_patience_grows_with_the_longest_step(tmp_path: Path) -> None:
    clock, metrics = Clock(), tmp_path / "metrics.jsonl"
    watchdog = Watchdog(metrics, 60.0, clock)
    metrics.write_text("".join(json.dumps({"step": step, "step_s": s}) + "\n" for step, s in ((1, 30.0), (2, 10.0))) + '{"step": 3, "st')
    assert watchdog.stuck_s() is None
    clock.now_s = 599
    assert watchdog.stuck_s() is None
    clock.now_s = 601
    assert watchdog.stuck_s() == 601
    with metrics.open("a") as file:
        file.write('ep_s": 1}\n')
    assert watchdog.stuck_s() is None
