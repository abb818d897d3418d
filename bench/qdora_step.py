"""One optimizer step of QLoRA + DoRA + rsLoRA: seconds and bytes, measured on the train stage's own loop. Needs a CUDA card.

    python -m bench.qdora_step --model DIR --tokens 4096                       # T4 mode: float16, no flex attention
    python -m bench.qdora_step --model DIR --tokens 2048 --cap-bytes 15600000000

DIR holds a Gemma 3 in the hub's layout (python -m trainer.random_weights DIR --size 12b --device cuda). A row of data is one
document of exactly --tokens tokens, all of them supervised; a step is one row. step_s is the median over the measured
steps, each ended by a synchronisation; kernel_s is the sum of all kernels of one more step under torch's profiler, without
copies and memsets; peak_bytes and reserved_bytes are torch's own maxima over the measured steps. Out of memory is a row too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import rows
from trainer.config import Config, load

WARMUP = 2
PROFILED = 1
ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    cfg = config(options)
    cache = cfg.paths.cache.resolve()
    os.environ.update(ENVIRONMENT | {"UNSLOTH_COMPILE_LOCATION": str(cache / "unsloth")})
    if options.mode == "t4":
        os.environ["UNSLOTH_ENABLE_FLEX_ATTENTION"] = "0"
    watch = Watch(options.steps, options.device)
    outcome = measure(cfg, options, watch)
    work = {
        "adapter": "dora" if cfg.adapter.dora else "lora",
        "mode": options.mode,
        "tokens": options.tokens,
        "rank": cfg.adapter.rank,
        "optimizer": cfg.train.optimizer,
        "cap_bytes": options.cap_bytes,
        "keep_bytes": 0,
        "keep_pinned_bytes": 0,
        "without": "kernels",
        "backend": cfg.model.backend,
    }
    row = rows.append("qdora_step", "ours", work, {"outcome": outcome, **watch.metrics()}, options.out)
    print(json.dumps(row, indent=2))
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory in the hub's layout, or random:tiny")
    parser.add_argument("--preset", default="gemma3-12b-t4")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--mode", choices=("t4", "bf16"), default="t4")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after the warm-up")
    parser.add_argument("--cap-bytes", type=int, default=None, help="what this process may take of the card; 15600000000 stands for a T4")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only proves that the bench runs")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as in python -m trainer")
    parser.add_argument("--out", type=Path, default=None, help="file to append to, instead of bench/results/qdora_step.jsonl")
    return parser.parse_args(arguments)


def config(options: argparse.Namespace) -> Config:
    """The preset with one row a step, no checkpoints, and as many steps as are warmed up, measured and profiled."""
    steps = WARMUP + options.steps + PROFILED
    forced = [
        f"model.name={options.model}",
        f"model.device={options.device}",
        f"data.max_tokens={options.tokens}",
        f"export.num_ctx={max(options.tokens, 512)}",
        f"train.tokens_per_step={options.tokens}",
        "train.batch_records=1",
        f"train.max_steps={steps}",
        "train.valid_every=1000000",
        "checkpoint.every_steps=1000000",
        f"paths.cache={options.cache}",
    ]
    if options.mode == "bf16":
        forced.append("model.dtype=bfloat16")
    return load(options.preset, [*forced, *options.set])


def measure(cfg: Config, options: argparse.Namespace, watch: Watch) -> str:
    """Run the loop; returns the row's outcome."""
    from trainer.backends import hub
    from trainer.training import loop, model
    from trainer.training.batches import Example
    from trainer.worker import is_out_of_memory

    state = model.nf4(cfg)  # made before the cap: quantising has needs of its own
    print(f"NF4 state: {state}", flush=True)
    cap(options.cap_bytes)
    vocabulary = hub.size(cfg.model, cfg.paths.cache).vocab_size
    choose = random.Random(0)

    def document(number: int, length: int) -> Example:
        ids = [2, *(choose.randrange(200, vocabulary) for _ in range(length - 1))]
        return Example(f"{number:04d}", array("i", ids), ((1, length),))

    documents = [document(number, options.tokens) for number in range(WARMUP + options.steps + PROFILED)]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            loop.run(cfg, documents, [document(9999, min(64, options.tokens))], Path(scratch), watch.after_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"out of memory: {error}", file=sys.stderr)
            return "out_of_memory"
        finally:
            watch.close()
    return "ok"


def cap(cap_bytes: int | None) -> None:
    """Let this process's tensors take at most so many bytes of the card."""
    import torch

    if cap_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / torch.cuda.get_device_properties(0).total_memory))


class Watch:
    """Times between steps, maxima of memory, and the kernels of the last step."""

    def __init__(self, steps: int, device: str) -> None:
        self._steps, self._device = steps, device
        self._times: list[float] = []
        self._peak: tuple[int, int] | None = None
        self._kernel_s: float | None = None
        self._profiler: Any = None

    def after_step(self, step: int) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())
        if step == WARMUP and self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if step == WARMUP + self._steps:
            self._remember_peak()
            self._profiler = torch.profiler.profile(activities=[self._activity()])
            self._profiler.__enter__()
        elif step == WARMUP + self._steps + PROFILED:
            self._profiler.__exit__(None, None, None)
            self._kernel_s, self._profiler = kernel_s(self._profiler), None

    def close(self) -> None:
        """After a failure inside the profiled step."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler = None
        if self._peak is None:
            self._remember_peak()

    def metrics(self) -> dict[str, Any]:
        ends = self._times[WARMUP - 1 : WARMUP + self._steps]
        steps = [after - before for before, after in pairwise(ends)]
        peak, reserved = self._peak or (0, 0)
        return {
            "step_s": statistics.median(steps) if steps else None,
            "kernel_s": self._kernel_s,
            "steps": len(steps),
            "peak_bytes": peak,
            "reserved_bytes": reserved,
            "pinned_bytes": 0,
        }

    def _remember_peak(self) -> None:
        import torch

        if self._device == "cuda":
            self._peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def _activity(self) -> Any:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CUDA if self._device == "cuda" else ProfilerActivity.CPU


def kernel_s(profiler: Any) -> float:
    """Seconds of all CUDA kernels; copies, memsets and annotated ranges have other categories in the trace."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return sum(float(event["dur"]) for event in events if event.get("cat") == "kernel") / 1e6


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
