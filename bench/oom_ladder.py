"""The ladder on a real card: the same training under one cap after the other, each a little less than the rung before it needs.

    python -m bench.oom_ladder --model DIR --data FILE --log docs/oom_ladder.log                       # a cap for every rung
    python -m bench.oom_ladder --model DIR --data FILE --log docs/oom_ladder.log --caps 9.0e9 8.5e9    # caps of your own, bytes

DIR as in bench.qdora_step. A cap is a share of the card that torch's allocator may take (PYTORCH_ALLOC_CONF), so that what runs out
is what would run out on a smaller card, and `python -m trainer train` is run as it is. The log is what it said, and a line of JSON
a cap: exit code, rungs, tokens of a step, first and last loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer import gemma3, oom
from trainer.config import Config, load
from trainer.facts import TrainFacts
from trainer.planner.budget import budget


def main(arguments: Sequence[str]) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="directory in the hub's layout")
    made.add_argument("--data", required=True)
    made.add_argument("--preset", default="gemma3-12b-t4")
    made.add_argument("--caps", type=float, nargs="*", default=[], help="bytes; without them one a rung, from the plan")
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--cache", default=".cache")
    made.add_argument("--log", type=Path, required=True)
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = made.parse_args(arguments)
    settings = [
        f"model.name={options.model}",
        f"data.path={options.data}",
        f"paths.cache={options.cache}",
        f"train.max_steps={options.steps}",
        "run.name=ladder",
        *options.set,
    ]
    cfg = load(options.preset, settings)
    with options.log.open("a", encoding="utf-8") as log:
        for cap in options.caps or caps(cfg, gemma3.read(Path(options.model) / "config.json")):
            found = run(options.preset, settings, capped(cap))
            log.write(f"$ cap of {cap / 1e9:.2f} GB\n{found.pop('said')}{json.dumps({'cap_bytes': round(cap), **found})}\n\n")
            log.flush()
            print(json.dumps({"cap_bytes": round(cap), **found}))
    return 0


def caps(cfg: Config, size: gemma3.Size) -> Iterator[float]:
    """Half-way between what two neighbours need, where the lower one needs less."""
    attempts = [oom.Attempt()]
    while (step := oom.climb(cfg, attempts[-1], oom.EXPANDABLE)) is not None:
        attempts.append(step.attempt)
    for above, below in pairwise(budget(attempt.in_force(cfg), size).allocated_bytes for attempt in attempts):
        if below < above:
            yield (above + below) / 2


def capped(cap_bytes: float) -> dict[str, str]:
    """This environment, with a share of the card for torch's allocator."""
    share = cap_bytes / card_bytes()
    return {**os.environ, "PYTORCH_ALLOC_CONF": f"{oom.EXPANDABLE},per_process_memory_fraction:{share:.6f}"}


def run(preset: str, settings: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "trainer", "train", "--preset", preset]
        command += [f"--set={text}" for text in (*settings, f"paths.output={output}")]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        found: dict[str, Any] = {"said": done.stdout, "exit_code": done.returncode}
        record = Path(output) / "runs" / "ladder" / "train" / "artifact.json"
        if record.is_file():
            facts = TrainFacts.model_validate(json.loads(record.read_text(encoding="utf-8"))["facts"])
            found |= {"rungs": facts.rungs, "peak_bytes": facts.peak_bytes, "tokens_per_step": round(facts.num_tokens / facts.steps)}
            found |= {"first_loss": facts.train_loss[0].loss, "last_loss": facts.train_loss[-1].loss}
    return found


def card_bytes() -> int:
    """Of the first card, from the driver: a CUDA context of this process would hold memory itself."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
