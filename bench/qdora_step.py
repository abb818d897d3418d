"""One optimizer step of QLoRA + DoRA + rsLoRA: seconds and bytes, measured on the train stage's own loop. Needs a CUDA card.

    python -m bench.qdora_step --model DIR --tokens 4096 --cap-bytes 15600000000     # T4 mode: what a T4 can run, in its memory
    python -m bench.qdora_step --model DIR --who unsloth                             # unsloth's plain QLoRA, the peer
    python -m bench.qdora_step --model DIR --who unsloth --set adapter.dora=true     # unsloth with PEFT's DoRA
    python -m bench.qdora_step --model DIR --without attention                       # ours, one piece switched off
    python -m bench.qdora_step --model DIR --mixed packed --steps 100                # records of mixed lengths

DIR holds a Gemma 3 in the hub's layout (python -m trainer.random_weights DIR --size 12b --device cuda). A row of data is one
document of exactly --tokens tokens, all of them supervised; a step is --accumulation rows. step_s is the median over the
measured steps, each ended by a synchronisation, from the end of the step before it, norm refresh included. Steps that the loss
scale skipped are not among them; --warmup must be long enough for the scale to settle, after which B != 0 and m != n, as there
is no warm-up of the learning rate. kernel_s is the sum of all kernels of one more step under torch's profiler, without copies
and memsets (they overlap with kernels, kernels do not with each other). peak_bytes and reserved_bytes are torch's own maxima over
the measured steps, host_pinned_bytes what torch's pinned allocator handed out at most, pinned_bytes what the loop says that it
pinned, or that maximum where it does not say. first_step_s holds every compilation; a --cache that is new makes it a cold one.
With --mixed every row is a micro-batch and a step of its own, and `compiles` counts Triton kernels and torch.compile graphs that
are new in measured steps.
Out of memory is a row too.

The peer's row runs the same loop, unsloth's decoder layers and checkpointing, and our chunked loss: unsloth fuses its own too.
T4 mode on a newer card: float16, no flash or cuDNN attention, no TF32. `forbidden` lists kernels that break it (bench.kernels).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import kernels, mix, rows
from trainer.config import Config, load

PIECES = ("layer", "dora", "attention", "norms", "geglu", "loss", "offload")
"""What `kernels` has of ours."""
PEER = ["model.backend=unsloth", "adapter.dora=false", *(f"kernels.{piece}=stock" for piece in PIECES if piece != "loss")]
"""unsloth as it is; a --set of the caller's comes after it."""
ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"} | {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True"  # as the trainer sets it
}


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__).parse_args(arguments)
    profiled = 0 if options.mixed else 1
    cfg = config(options, options.warmup + options.steps + profiled)
    watch = Watch(options.warmup, options.steps, options.device, profiled=bool(profiled))
    found = measure(cfg, options, watch.after_step)
    watch.close()
    metrics = {"outcome": found.outcome, **watch.metrics(found.skipped()), **found.metrics()}
    if options.mixed:
        metrics |= watch.speed(found.journal)
    metrics["forbidden"] = kernels.forbidden(one.name for one in watch.kernels) if options.mode == "t4" and watch.kernels else None
    row = rows.append("qdora_step", who(options), work(cfg, options), metrics, options.out, options.run)
    if options.kernels and watch.kernels:
        kernels.write(
            options.kernels, watch.kernels, {name: row[name] for name in ("who", "work", "hardware", "versions", "commit", "run")}
        )
    print(json.dumps(row, indent=2))
    return 0


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="directory in the hub's layout, or random:tiny")
    made.add_argument("--preset", default="gemma3-12b-t4")
    made.add_argument("--who", choices=("ours", "unsloth"), default="ours")
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--mode", choices=("t4", "bf16"), default="t4")
    made.add_argument("--steps", type=int, default=5, help="measured steps, after the warm-up")
    made.add_argument("--warmup", type=int, default=6, help="steps before those; the loss scale finds its place in them")
    made.add_argument("--accumulation", type=int, default=1, help="rows of a step")
    made.add_argument("--mixed", choices=("packed", "unpacked"), default=None, help="records of mixed lengths, --tokens at most")
    made.add_argument("--without", choices=PIECES, action="append", default=[], help="a piece of ours to switch off")
    made.add_argument("--keep-bytes", type=int, default=None, help="instead of the preset's kernels.keep_bytes")
    made.add_argument("--keep-pinned-bytes", type=int, default=None)
    made.add_argument("--cap-bytes", type=int, default=None, help="what this process may take of the card; 15600000000 stands for a T4")
    made.add_argument("--cache", type=Path, default=Path(".cache"))
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only proves that the bench runs")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as in python -m trainer")
    made.add_argument("--out", type=Path, default=None, help="file to append to, instead of the one in bench/results/")
    made.add_argument("--kernels", type=Path, default=None, metavar="FILE", help="write the profiled step's kernels there")
    made.add_argument("--run", default=None, metavar="ID", help="what several commands on one machine share; else TRINITY_RUN")
    return made


def config(options: argparse.Namespace, steps: int) -> Config:
    """The preset with so many steps, no checkpoints, and what the options say; --set comes last."""
    forced = [
        f"model.name={options.model}",
        f"model.device={options.device}",
        f"data.max_tokens={options.tokens}",
        f"export.num_ctx={max(options.tokens, 512)}",
        f"train.tokens_per_step={1 if options.mixed else options.tokens * options.accumulation}",
        "train.batch_records=1",
        "train.warmup_steps=0",
        f"train.max_steps={steps}",
        "train.valid_every=1000000",
        "checkpoint.every_steps=1000000",
        f"pack.enabled={str(options.mixed == 'packed').lower()}",
        f"paths.cache={options.cache}",
        *(PEER if options.who == "unsloth" else []),
        *(f"kernels.{piece}=stock" for piece in options.without),
        *(["model.dtype=bfloat16"] if options.mode == "bf16" else []),
        *([f"kernels.keep_bytes={options.keep_bytes}"] if options.keep_bytes is not None else []),
        *([f"kernels.keep_pinned_bytes={options.keep_pinned_bytes}"] if options.keep_pinned_bytes is not None else []),
    ]
    return load(options.preset, [*forced, *options.set])


def who(options: argparse.Namespace) -> str:
    return "ours" if options.who == "ours" else f"unsloth {importlib.metadata.version('unsloth')}"


def work(cfg: Config, options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a row, from the config that ran."""
    ours = options.who == "ours"
    off = [piece for piece in PIECES if getattr(cfg.kernels, piece) == "stock"]
    found = {
        "adapter": "dora" if cfg.adapter.dora else "lora",
        "mode": options.mode,
        "tokens": cfg.data.max_tokens,
        "rank": cfg.adapter.rank,
        "optimizer": cfg.train.optimizer,
        "cap_bytes": options.cap_bytes,
        "keep_bytes": cfg.kernels.keep_bytes if ours else 0,
        "keep_pinned_bytes": cfg.kernels.keep_pinned_bytes if ours else 0,
        "without": ",".join(off) or None if ours else None,
        "backend": cfg.model.backend,
        "accumulation": options.accumulation,
    }
    if ours:
        found |= {name: getattr(cfg.kernels, name) for name in ("mlp_tile_tokens", "span_layers", "pin_gradients")}
    if options.mixed:
        found |= {"mix": mix.NAME, "packed": cfg.pack.enabled}
    return found


class Measured(NamedTuple):
    outcome: str
    facts: Any
    """TrainFacts, or None after an out of memory."""
    journal: list[dict[str, Any]]
    """What the loop wrote to metrics.jsonl."""

    def skipped(self) -> set[int]:
        """Steps that changed no weight, since their gradients overflowed: they have no norm."""
        return {line["step"] for line in self.journal if "loss" in line and line.get("grad_norm") is None}

    def metrics(self) -> dict[str, Any]:
        measured = host_pinned_bytes()
        return {
            # a peer's loop does not say
            "pinned_bytes": getattr(self.facts, "pinned_bytes", 0) or measured,
            "host_pinned_bytes": measured,
            "first_step_s": next((line["step_s"] for line in self.journal if "step_s" in line), None),
            "kernels": list(self.facts.kernels) if self.facts else None,
        }


def measure(cfg: Config, options: argparse.Namespace, after_step: Callable[[int], None]) -> Measured:
    """Run the loop on documents of random tokens."""
    set_up(cfg, options)
    from trainer.backends import hub
    from trainer.training import loop, model
    from trainer.worker import is_out_of_memory

    state = model.nf4(cfg)  # made before the cap: quantising has needs of its own
    print(f"NF4 state: {state}", flush=True)
    cap(options.cap_bytes)
    vocabulary = hub.size(cfg.model, cfg.paths.cache).vocab_size
    wanted = cfg.train.max_steps * options.accumulation
    lengths = mix.lengths(wanted, options.tokens, packed=cfg.pack.enabled) if options.mixed else [options.tokens] * wanted
    train, valid = documents(lengths, vocabulary), documents([min(64, options.tokens)], vocabulary)
    with tempfile.TemporaryDirectory() as scratch:
        outcome, facts = "ok", None
        try:
            facts = loop.run(cfg, train, valid, Path(scratch), after_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"out of memory: {error}", file=sys.stderr)
            outcome = "out_of_memory"
        journal = Path(scratch) / "metrics.jsonl"
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        return Measured(outcome, facts, [json.loads(line) for line in lines])


def set_up(cfg: Config, options: argparse.Namespace) -> None:
    """The environment that libraries read at import, and in T4 mode torch's switches."""
    cache = cfg.paths.cache.resolve()
    caches = {"UNSLOTH_COMPILE_LOCATION": "unsloth", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    os.environ.update(ENVIRONMENT | {name: str(cache / folder) for name, folder in caches.items()})
    if options.mode == "t4" and options.device == "cuda":
        os.environ["UNSLOTH_ENABLE_FLEX_ATTENTION"] = "0"
        import torch

        torch.backends.cuda.enable_flash_sdp(enabled=False)
        torch.backends.cuda.enable_cudnn_sdp(enabled=False)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def documents(lengths: Sequence[int], vocabulary: int) -> list[Any]:
    """Examples of random tokens, every one supervised but the first."""
    from trainer.training.batches import Example

    choose = random.Random(0)
    return [
        Example(f"{number:06d}", array("i", [2, *(choose.randrange(200, vocabulary) for _ in range(length - 1))]), ((1, length),))
        for number, length in enumerate(lengths)
    ]


def cap(cap_bytes: int | None) -> None:
    """Let this process's tensors take at most so many bytes of the card."""
    import torch

    if cap_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / torch.cuda.get_device_properties(0).total_memory))


def host_pinned_bytes() -> int:
    """Most bytes that torch's allocator of pinned memory has handed out in this process, the data loader's among them."""
    import torch

    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)) if torch.cuda.is_available() else 0


class Watch:
    """Times of steps, maxima of memory over the measured ones, and the kernels of one more."""

    def __init__(self, warmup: int, steps: int, device: str, *, profiled: bool) -> None:
        self._warmup, self._last, self._device, self._profiled = warmup, warmup + steps, device, profiled
        self._step_s: dict[int, float] = {}
        self._began = 0.0
        self._peak: tuple[int, int] | None = None
        self._compiled: list[int] = []
        self._profiler: Any = None
        self.kernels: list[kernels.Kernel] = []

    def after_step(self, step: int) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        if self._warmup < step <= self._last:
            self._step_s[step] = time.perf_counter() - self._began
        if step == self._warmup:
            self._compiled.append(mix.compiled())
            if self._device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if step == self._last:
            self._compiled.append(mix.compiled())
            self._remember_peak()
            if self._profiled:
                self._profiler = torch.profiler.profile(activities=[self._activity()])
                self._profiler.__enter__()
        elif self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self.kernels, self._profiler = kernels.collect(kernels.trace(self._profiler)), None
        self._began = time.perf_counter()  # what was done here belongs to no step

    def close(self) -> None:
        """After a failure inside a step."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler = None
        if self._peak is None:
            self._remember_peak()

    def metrics(self, skipped: set[int]) -> dict[str, Any]:
        """skipped: steps without an update; their times count for nothing, and a profiled one among them gives no kernel_s."""
        peak, reserved = self._peak or (0, 0)
        times = [took for step, took in self._step_s.items() if step not in skipped]
        return {
            "step_s": statistics.median(times) if times else None,
            "kernel_s": kernels.seconds(self.kernels) if self.kernels and self._last + 1 not in skipped else None,
            "steps": len(times),
            "skipped_steps": len(skipped),
            "peak_bytes": peak,
            "reserved_bytes": reserved,
            "compiles": self._compiled[1] - self._compiled[0] if len(self._compiled) == 2 else None,
            "warmup_compiles": self._compiled[0] if self._compiled else None,
        }

    def speed(self, journal: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tokens of the measured steps over their time."""
        seen = {line["step"]: line["num_tokens"] for line in journal if "num_tokens" in line}
        if not {self._warmup, self._last} <= seen.keys():
            return {"num_tokens": None, "tokens_per_s": None}
        tokens = seen[self._last] - seen[self._warmup]
        return {"num_tokens": tokens, "tokens_per_s": tokens / sum(self._step_s.values())}

    def _remember_peak(self) -> None:
        import torch

        if self._device == "cuda":
            self._peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def _activity(self) -> Any:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CUDA if self._device == "cuda" else ProfilerActivity.CPU


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
