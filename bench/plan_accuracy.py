"""The plan's forecast of allocated and reserved bytes beside what a card measured, setting by setting. Needs a CUDA card.

    python -m bench.plan_accuracy --model DIR                        # all of them, in T4 mode under a T4's memory
    python -m bench.plan_accuracy --model DIR --configs r16,t8192    # some
    python -m bench.plan_accuracy --list                             # their names, and what is forecast
    python -m bench.plan_accuracy --report                           # the committed rows: worst errors of both halves, wrong verdicts

DIR holds a Gemma 3 in the hub's layout (python -m trainer.random_weights DIR --size 12b --device cuda). One process and one load of the
base, or two where bfloat16 is among the settings: adapter and layers are new for each, the NF4 weights stay. A setting takes seconds:
steps until the optimizer has a state (the loss scale finds its place in them), then the maxima of --steps more. One that is in the file
already, of the same commit, is not run again. Out of memory is a row, and the next one goes on.

The steps are the loop's own arithmetic and optimizer without its Trainer around them, and transformers loads the base: the setting
`plain` is the one that bench.qdora_step measures through the loop, for comparison.
predicted_fits says whether the forecast of reserved bytes is within --cap-bytes, outcome whether it was so. `half`: the constants in
planner/ours.py may be fitted on rows of half "fit" only; "test" says how good they are.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench import qdora_step, rows
from trainer.config import Config, load
from trainer.gemma3 import Size
from trainer.planner.budget import budget

BENCH = "plan_accuracy"
WARMUP = 12
"""Most steps until the loss scale has found its place."""
CPU_SHARE = 32
"""On a CPU rows are so many times shorter: there is nothing to measure but that it runs."""
LIMITS = {"allocated": (-0.03, 0.05), "reserved": (-0.03, 0.08)}
"""Errors that the plan is held to: how far under, and how far over."""


class Setting(NamedTuple):
    """One configuration: what differs from 4096 tokens, rank 64, DoRA, float16, 8-bit AdamW, nothing kept, one pass a step."""

    half: Literal["fit", "test"]
    more: tuple[str, ...] = ()
    passes: int = 1


LONG = ("kernels.span_layers=2", "kernels.pin_gradients=true")
KEEP = ("kernels.keep_bytes=2500000000", "kernels.keep_pinned_bytes=2500000000")
SETTINGS: Mapping[str, Setting] = {
    "plain": Setting("fit"),
    "r16": Setting("test", ("adapter.rank=16",)),
    "r128": Setting("fit", ("adapter.rank=128",)),
    "t1024": Setting("test", ("data.max_tokens=1024",)),
    "t2048": Setting("fit", ("data.max_tokens=2048",)),
    "t8192": Setting("test", ("data.max_tokens=8192",)),
    "t16384": Setting("fit", ("data.max_tokens=16384",)),
    "t16384-long": Setting("test", ("data.max_tokens=16384", *LONG)),
    "keep": Setting("fit", KEEP),
    "keep-passes": Setting("test", KEEP, passes=2),
    "lora": Setting("test", ("adapter.dora=false",)),
    "adamw32": Setting("fit", ("train.optimizer=adamw32",)),
    "r16-lora-adamw32": Setting("test", ("adapter.rank=16", "adapter.dora=false", "train.optimizer=adamw32", "data.max_tokens=8192")),
    "r128-t16384-adamw32": Setting("fit", ("adapter.rank=128", "data.max_tokens=16384", "train.optimizer=adamw32")),
    "bf16": Setting("test", ("model.dtype=bfloat16",)),
    "bf16-r16-lora": Setting("fit", ("model.dtype=bfloat16", "adapter.rank=16", "adapter.dora=false", "data.max_tokens=2048")),
    "bf16-r128-t8192": Setting("test", ("model.dtype=bfloat16", "adapter.rank=128", "data.max_tokens=8192")),
    "bf16-keep-passes": Setting("fit", ("model.dtype=bfloat16", *KEEP), passes=2),
}


class Measured(NamedTuple):
    """Of torch's allocator over the measured steps; context_bytes: of the card beside it. 0 on a CPU, which has no such count."""

    outcome: str
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    target = options.out or rows.RESULTS / f"{BENCH}.jsonl"
    if options.report:
        print(json.dumps(report(read(target)), indent=2))
        return 0
    names = options.configs.split(",") if options.configs else list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        print(f"no setting {', '.join(unknown)}; there are: {', '.join(SETTINGS)}", file=sys.stderr)
        return 2
    if options.list:
        for name in names:
            print(f"{name:<22}{SETTINGS[name].half:<6}{' '.join(SETTINGS[name].more)}")
        return 0
    done = {(json.dumps(row["work"], sort_keys=True), row["commit"]) for row in read(target)}
    measure([name for name in names if (json.dumps(work(name, options), sort_keys=True), rows.commit()) not in done], options)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="", help="directory in the hub's layout, or random:tiny")
    made.add_argument("--preset", default="gemma3-12b-t4")
    made.add_argument("--configs", default="", help="names, with commas between them; all without")
    made.add_argument("--steps", type=int, default=2, help="measured steps")
    made.add_argument("--cap-bytes", type=int, default=15_600_000_000, help="what this process may take of the card; 0 is all of it")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only proves that the bench runs")
    made.add_argument("--cache", type=Path, default=Path(".cache"))
    made.add_argument("--out", type=Path, default=None, help="file to append to, instead of the one in bench/results/")
    made.add_argument("--run", default=None, metavar="ID", help="what several commands on one machine share; else TRINITY_RUN")
    made.add_argument("--list", action="store_true")
    made.add_argument("--report", action="store_true")
    return made


def config(name: str, options: argparse.Namespace) -> Config:
    """The preset, under one setting."""
    setting = SETTINGS[name]
    forced = [
        f"model.name={options.model}",
        f"model.device={options.device}",
        "model.backend=transformers",
        f"paths.cache={options.cache}",
        "export.num_ctx=65536",
        "data.max_tokens=4096",
        "train.batch_records=1",
        "pack.enabled=true",
        "adapter.rank=64",
        "kernels.layer=ours",
        "kernels.keep_bytes=0",
        "kernels.keep_pinned_bytes=0",
        *setting.more,
        *(["train.optimizer=adamw32", "model.dtype=float32", "kernels.pin_gradients=false"] if options.device == "cpu" else []),
    ]
    tokens = load(options.preset, forced).data.max_tokens
    if options.device == "cpu":
        tokens //= CPU_SHARE
        forced.append(f"data.max_tokens={tokens}")
    return load(options.preset, [*forced, f"train.tokens_per_step={setting.passes * tokens if setting.passes > 1 else 1}"])


def work(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a row, named as in bench.qdora_step."""
    cfg, setting = config(name, options), SETTINGS[name]
    return {
        "setting": name,
        "half": setting.half,
        "adapter": "dora" if cfg.adapter.dora else "lora",
        "mode": "bf16" if cfg.model.dtype == "bfloat16" else "t4",
        "tokens": cfg.data.max_tokens,
        "rank": cfg.adapter.rank,
        "optimizer": cfg.train.optimizer,
        "cap_bytes": options.cap_bytes or None,
        "without": None,
        "backend": cfg.model.backend,
        "accumulation": setting.passes,
        **{
            key: getattr(cfg.kernels, key) for key in ("keep_bytes", "keep_pinned_bytes", "mlp_tile_tokens", "span_layers", "pin_gradients")
        },
    }


def measure(names: Iterable[str], options: argparse.Namespace) -> None:
    """Each setting on the base that is loaded; those of one dtype come together."""
    configs = sorted(((name, config(name, options)) for name in names), key=lambda one: one[1].model.dtype != "float16")
    if not configs:
        print("all of them are in the file already")
        return
    qdora_step.set_up(configs[0][1], argparse.Namespace(mode="t4", device=options.device))
    from trainer.backends import hub
    from trainer.training import model

    state = model.nf4(configs[0][1])  # made before the cap: quantising has needs of its own
    if options.device == "cuda" and options.cap_bytes:
        qdora_step.cap(options.cap_bytes)
    base, dtype = None, ""
    for name, cfg in configs:
        if cfg.model.dtype != dtype:
            base = None
            _free()
            base, dtype = model.base(cfg, state), cfg.model.dtype
        size = hub.size(cfg.model, cfg.paths.cache)
        found = _run(cfg, base, size, SETTINGS[name].passes, options.steps)
        _free()
        row = rows.append(BENCH, "ours", work(name, options), metrics(cfg, size, found, options.cap_bytes), options.out, options.run)
        print(json.dumps({"setting": name, **row["metrics"]}), flush=True)


def metrics(cfg: Config, size: Size, found: Measured, cap_bytes: int) -> dict[str, Any]:
    """Forecast beside measurement; errors are signed, a share of what was measured, and absent where memory ran out."""
    plan = budget(cfg, size)
    ran = found.outcome == "ok" and found.allocated_bytes > 0
    return {
        "outcome": found.outcome,
        "predicted_bytes": plan.allocated_bytes,
        "measured_bytes": found.allocated_bytes,
        "error": plan.allocated_bytes / found.allocated_bytes - 1 if ran else None,
        "predicted_reserved_bytes": plan.reserved_bytes,
        "reserved_bytes": found.reserved_bytes,
        "reserved_error": plan.reserved_bytes / found.reserved_bytes - 1 if ran else None,
        "predicted_fits": not cap_bytes or plan.reserved_bytes <= cap_bytes,
        "context_bytes": found.context_bytes,
    }


def _run(cfg: Config, base: Any, size: Size, passes: int, steps: int) -> Measured:
    """One setting: a new adapter and new layers on the base, which is as it was afterwards."""
    from trainer.training import model
    from trainer.worker import is_out_of_memory

    adapted = model.with_new_adapter(cfg, base)
    inner = adapted.get_base_model().model
    stock = list(inner.layers)
    outcome = "ok"
    try:
        _steps(cfg, adapted, size, passes, steps)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        outcome = "out_of_memory"
    peak = _peak(cfg.model.device)
    for number, layer in enumerate(stock):
        inner.layers[number] = layer
    adapted.unload()
    return Measured(outcome, *peak)


def _steps(cfg: Config, adapted: Any, size: Size, passes: int, steps: int) -> None:
    """Optimizer steps as the loop makes them, over a document that fills the row."""
    from trainer.kernels import loss
    from trainer.training import batches, model, optimizer
    from trainer.training.scaling import Stepper

    stack = model.installed(cfg, adapted)
    document = qdora_step.documents([cfg.data.max_tokens], size.vocab_size)[0]
    head = adapted.get_base_model().get_output_embeddings().weight
    batch = model.moved(model.collator(cfg)([batches.row(document)]), head.device)
    stepper = Stepper(
        optimizer.build(adapted.named_parameters(), cfg.train),
        max_norm=cfg.train.max_grad_norm,
        after=stack.refresh,
        scaled=cfg.model.dtype == "float16",
        gather=stack.gather,
    )
    adapted.train()
    _free()
    warm = -1
    for step in range(WARMUP + steps):
        for _ in range(passes):
            total = loss.of_batch(batch, stack.hidden, head, stack.summed) / (passes * cfg.data.max_tokens)
            (total * stepper.scale).backward()  # type: ignore[no-untyped-call]
        stepper.step()
        stepper.zero_grad()
        if warm < 0 and stepper.state:
            warm = step
            _reset(cfg.model.device)
        if 0 <= warm <= step - steps:
            return
    raise RuntimeError(f"{WARMUP} steps and no update: the gradients are no numbers")


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _reset(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> tuple[int, int, int]:
    """Allocated and reserved at most, and what the card has given out beside torch's allocator."""
    import torch

    if device == "cpu":
        return 0, 0, 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free - torch.cuda.memory_reserved()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def report(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By half: rows, lowest and highest error of allocated and of reserved bytes, and settings beyond LIMITS; and wrong verdicts."""
    told: dict[str, Any] = {}
    for half in ("fit", "test"):
        mine = [row for row in found if row["work"]["half"] == half and row["metrics"]["error"] is not None]
        told[half] = {"rows": len(mine)}
        for kind, key in (("allocated", "error"), ("reserved", "reserved_error")):
            errors = {row["work"]["setting"]: row["metrics"][key] for row in mine}
            low, high = LIMITS[kind]
            worst = [min(errors.values(), default=None), max(errors.values(), default=None)]
            told[half][kind] = {"errors": worst, "beyond": [name for name, error in errors.items() if not low <= error <= high]}
    wrong = [row["work"]["setting"] for row in found if row["metrics"]["predicted_fits"] != (row["metrics"]["outcome"] == "ok")]
    return told | {"wrong_verdicts": wrong}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
