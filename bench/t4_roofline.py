"""What a step should take on a T4: FLOPs by type and bytes of one profiled step over the card's peaks. Needs a CUDA card.

    python -m bench.t4_roofline --model DIR --tokens 4096
    python -m bench.t4_roofline --model DIR --tokens 4096 --who unsloth

Options are bench.qdora_step's. The step runs in T4 mode on whatever card there is: what it launches is what a T4 would do, in
other tiles. How it is counted stands in bench.counting. t4_peak_s sums over operations the larger of its FLOPs over 65 TFLOP/s
(16 bit) or 8.1 (float32) and its bytes over 300 GB/s; t4_sustained_s takes 24 TFLOP/s for the tensor cores. Launches, and copies
between host and card that do not hide behind kernels, come on top. --kernels FILE takes the sums by operation.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import counting, kernels, qdora_step, rows


def main(arguments: Sequence[str]) -> int:
    parser = qdora_step.parser(__doc__)
    options = parser.parse_args(arguments)
    if options.mode != "t4" or options.mixed:
        parser.error("a T4's roofline is of a step in T4 mode on one document")
    cfg = qdora_step.config(options, options.warmup + 1)
    watch = Watch(options.warmup, options.device)
    try:
        found = qdora_step.measure(cfg, options, watch.after_step)
    finally:
        watch.close()
    if options.warmup + 1 in found.skipped():
        print("the counted step overflowed and had no update: no row; give a larger --warmup", file=sys.stderr)
        return 1
    counted = watch.counted
    metrics = {"outcome": found.outcome, **(counted.metrics() if counted else {}), "forbidden": kernels.forbidden(watch.names)}
    metrics["uncounted"] = sorted(counted.unknown_us, key=lambda name: -counted.unknown_us[name])[:8] if counted else None
    row = rows.append("t4_roofline", qdora_step.who(options), qdora_step.work(cfg, options), metrics, options.out, options.run)
    if options.kernels and counted:
        about = {name: row[name] for name in ("who", "work", "hardware", "versions", "commit", "run")}
        options.kernels.parent.mkdir(parents=True, exist_ok=True)
        options.kernels.write_text(json.dumps({**about, "operations": counted.by_name()}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=2))
    return 0


class Watch:
    """Profiles the step after the warm-up: torch's trace, its execution trace, and Triton's launches."""

    def __init__(self, warmup: int, device: str) -> None:
        self._warmup, self._device = warmup, device
        self._open = ExitStack()
        self._launches: list[counting.Done] = []
        self._profiler: Any = None
        self._file = Path()
        self.counted: counting.Counted | None = None
        self.names: list[str] = []

    def after_step(self, step: int) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        if step == self._warmup:
            self._begin()
        elif self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            events, self._profiler = kernels.trace(self._profiler), None
            self.names = [one.name for one in kernels.collect(events)]
            nodes = counting.read_execution_trace(self._file)
            self.counted = counting.count(events, nodes, self._launches, self._device)
            self._open.close()

    def _begin(self) -> None:
        from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

        scratch = self._open.enter_context(tempfile.TemporaryDirectory())
        self._file = Path(scratch) / "execution.json"
        self._launches = self._open.enter_context(counting.recorded_launches())
        observer = ExecutionTraceObserver().register_callback(str(self._file))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device == "cuda" else [])]
        self._profiler = profile(activities=activities, record_shapes=True, execution_trace_observer=observer)
        self._profiler.__enter__()

    def close(self) -> None:
        """After a failure inside the profiled step."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler = None
        self._open.close()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
