"""Three real training steps of preset gemma3-12b-t4 on this machine's card: bytes and seconds beside plan and roofline, one row to send back.

    make smoke-t4                                             # real weights where training here has left them, else random ones, made once
    python -m bench.smoke_t4 --cache /content/cache           # where 32 GB are free for those
    python -m bench.smoke_t4 --model DIR                      # a Gemma 3 12B in the hub's layout that you have

A step is a row of 4096 tokens through the train stage's own loop (bench.qdora_step has the details), after six whose times do not count:
they hold the compilations, and the loss scale finds its place in them. One more is profiled. A card with more memory than a T4 is held
to a T4's 15.6e9 bytes. Exit code 2 where there is no card, 1 where a step ran out of memory; that too is a row worth sending.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import qdora_step, rows
from trainer import cache, cards, gemma3
from trainer.config import Config, load
from trainer.errors import TrainerError
from trainer.planner import cards as planned
from trainer.planner import ours, roofline
from trainer.planner.budget import budget
from trainer.stages.plan import model_size

BENCH = "smoke_t4"
T4_BYTES = 15_600_000_000
"""What a process can have of a T4, CUDA's context aside."""
RANDOM = "random-12b"
ROOM_BYTES = 32_000_000_000
"""24.4 GB of random 16-bit weights and the NF4 state that is made of them."""
NO_CARD = """smoke-t4: no NVIDIA card answers here, and this measures one. What is missing, line by line: make doctor
A T4 for nothing: notebooks/colab_t4.ipynb on Colab or Kaggle, then `make smoke-t4` there."""


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(["--model", "", *arguments])
    # Before the driver is asked: of two cards (Kaggle's) HF would use both, and multiply the batch.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    card = cards.first()
    if options.device == "cuda" and card is None:
        print(NO_CARD, file=sys.stderr)
        return 2
    try:
        options.model = options.model or weights(options)
        return measure(options, card)
    except TrainerError as error:
        print(f"smoke-t4: {error}", file=sys.stderr)
        return error.exit_code


def measure(options: argparse.Namespace, card: cards.Card | None) -> int:
    """Run the steps, append the row, show it."""
    if card and options.device == "cuda" and options.cap_bytes is None and card.total_bytes > T4_BYTES * 1.05:
        options.cap_bytes = T4_BYTES
        print(f"smoke-t4: the {card.name} stands in for a T4: held to {T4_BYTES / 1e9:.1f} GB", flush=True)
    cfg = qdora_step.config(options, options.warmup + options.steps + 1)
    watch = qdora_step.Watch(options.warmup, options.steps, options.device, profiled=True)
    found = qdora_step.measure(cfg, options, watch.after_step)
    watch.close()
    metrics = {"outcome": found.outcome, **watch.metrics(found.skipped()), **found.metrics(), **forecast(cfg)}
    row = rows.append(BENCH, "ours", work(cfg, options, card), metrics, options.out, options.run)
    print(table(row["metrics"], card.name if card else "CPU"))
    print(f"send this back, from {options.out or rows.RESULTS / f'{BENCH}.jsonl'}:\n{json.dumps(row)}")
    return 0 if found.outcome == "ok" else 1


def parser() -> argparse.ArgumentParser:
    """bench.qdora_step's options, with another number of steps; without --model weights() finds one."""
    made = qdora_step.parser(__doc__)
    made.set_defaults(steps=3)
    return made


def weights(options: argparse.Namespace) -> str:
    """The preset's own model where its NF4 state lies in the cache, else random weights of its size, made there.

    Raises:
        MachineError: no room for them.
    """
    name = load(options.preset, options.set).model.name
    if any(options.cache.glob(f"nf4/{Path(name).name}-float16-*/nf4.json")):
        return name
    folder = options.cache.resolve() / RANDOM
    if not (folder / "config.json").is_file():
        cache.need_room(options.cache, ROOM_BYTES, "random weights of the 12B, and their NF4 state,")
        print(f"smoke-t4: {name} is not in {options.cache}: making random weights of its size in {folder}", flush=True)
        shutil.rmtree(folder.with_name(f"{RANDOM}.partial"), ignore_errors=True)  # of an attempt that was killed
        # In a child, so that what it takes of the card is given back before anything is measured.
        command = [sys.executable, "-m", "trainer.random_weights", str(folder), "--size", "12b"]
        command += ["--device", options.device, "--cache", str(options.cache)]
        if subprocess.run(command, cwd=rows.ROOT, check=False).returncode != 0:
            raise TrainerError(f"{folder}: the random weights could not be made, as said above")
    return str(folder)


def work(cfg: Config, options: argparse.Namespace, card: cards.Card | None) -> dict[str, Any]:
    """As in bench.qdora_step, and whose weights on which card."""
    is_random = cfg.model.name.startswith("random:") or Path(cfg.model.name).name == RANDOM
    seen = {"card": card.name, "card_bytes": card.total_bytes} if card and options.device == "cuda" else {"card": None, "card_bytes": None}
    return {**qdora_step.work(cfg, options), "preset": options.preset, "weights": "random" if is_random else "real", **seen}


def forecast(cfg: Config) -> dict[str, Any]:
    """What the plan says of this very config, and the time of its step on a T4 by the roofline: at what it sustains, and at its peak."""
    size: gemma3.Size = model_size(cfg.model)
    found, t4 = budget(cfg, size), planned.CARDS["T4"]
    return {
        "predicted_bytes": found.allocated_bytes,
        "predicted_reserved_bytes": found.reserved_bytes,
        "predicted_pinned_bytes": ours.pinned_bytes(cfg, size),
        "t4_sustained_s": roofline.step_s(cfg, size, t4),
        "t4_peak_s": roofline.step_s(cfg, size, t4._replace(flops_per_s=65e12)),
    }


def table(metrics: Mapping[str, Any], card: str) -> str:
    """Measured beside foretold."""

    def gb(name: str) -> str:
        return f"{metrics[name] / 1e9:.2f} GB" if metrics.get(name) else "-"

    def seconds(name: str) -> str:
        return f"{metrics[name]:.2f} s" if metrics.get(name) else "-"

    lines = [
        ("", f"this {card}", "plan"),
        ("allocated", gb("peak_bytes"), gb("predicted_bytes")),
        ("reserved", gb("reserved_bytes"), gb("predicted_reserved_bytes")),
        ("pinned", gb("pinned_bytes"), gb("predicted_pinned_bytes")),
        ("a step", seconds("step_s"), f"{seconds('t4_sustained_s')} on a T4 at 24 TFLOP/s, {seconds('t4_peak_s')} at its peak"),
        ("its kernels", seconds("kernel_s"), ""),
        ("outcome", f"{metrics['outcome']}, {metrics['steps']} steps, {metrics['skipped_steps']} skipped", ""),
    ]
    return "\n".join(f"  {name:<14}{measured:<28}{told}".rstrip() for name, measured, told in lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
