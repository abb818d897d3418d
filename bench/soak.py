"""What must hold for long, under kills at random moments.

    python -m bench.soak --case train_kills --trials 500          # resumable: counts go on where they stopped
    python -m bench.soak --case export_kills --seconds 60 --at-least 5
    python -m bench.soak --case gateway_chaos --seconds 900       # likewise; needs an Ollama (TRINITY_OLLAMA or PATH)

The kills end a stage with SIGKILL: nothing that reads as whole may be torn, and the next run must finish. A trial forks from this
process, which has imported torch and its friends but never run them (a fork of a process with live thread pools hangs), so that it
costs seconds less than a start from nothing. Preset `tiny`, whose stages take a few seconds. gateway_chaos is bench.chaos: clients go
on asking while their engine is killed, and no outcome of a request may be unaccounted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import chaos, kills, rows
from trainer import artifacts
from trainer.config import Config, load

TRAINS = "train_kills"
CASES = (TRAINS, "export_kills")


class Tally(NamedTuple):
    trials: int = 0
    torn: int = 0
    lost: int = 0
    failed: int = 0
    """Runs after a kill that did not finish by themselves."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*sorted(CASES), chaos.CASE], required=True)
    parser.add_argument("--trials", type=int, default=100, help="stop after so many kills, those of earlier calls included")
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        help="stop after this time, but not before --at-least; gateway_chaos: 900, those of earlier calls included",
    )
    parser.add_argument("--at-least", type=int, default=0, help="fewer trials, or answers, are a failure")
    parser.add_argument("--seed", type=int, default=None, help="of gateway_chaos; else another one at each call")
    parser.add_argument("--dir", type=Path, default=Path("output/soak"))
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/soak.jsonl")
    options = parser.parse_args(arguments)
    return _chaos(options) if options.case == chaos.CASE else _kills(options)


def _chaos(options: argparse.Namespace) -> int:
    state = options.dir / chaos.CASE / "tally.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    tally, seed = chaos.read(state), options.seed if options.seed is not None else random.randrange(1 << 32)
    left_s = (900.0 if options.seconds is None else options.seconds) - tally.seconds
    if left_s > 0:
        print(f"{chaos.CASE}: {left_s:.0f} s with --seed {seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            tally += chaos.run(Path(folder), left_s, seed, state.with_name("gateway.log"))
        artifacts.write_whole(state, json.dumps(asdict(tally)).encode())
    failures = tally.failures(options.at_least)
    for name, number in sorted({**tally.whys, **tally.events}.items()):
        print(f"{chaos.CASE}: {number:6} {name}")
    print(chaos.line(tally), *failures, sep="\n  PROBLEM ")
    if options.record:
        work = {"case": chaos.CASE, "engine": "ollama", "clients": chaos.CLIENTS, "seconds": round(tally.seconds), "seed": seed}
        rows.append("soak", who="ours", work=work, metrics=chaos.metrics(tally))
    return 1 if failures else 0


def _kills(options: argparse.Namespace) -> int:
    kills.import_heavy()
    kill = kills.kill_trains if options.case == TRAINS else kill_exports
    seconds = float("inf") if options.seconds is None else options.seconds
    tally = kill(options.dir / options.case, options.trials, seconds, options.at_least)
    found = tally._asdict()
    print(f"{options.case}: {', '.join(f'{number} {name}' for name, number in found.items())}")
    if options.record:
        rows.append("soak", who="ours", work={"case": options.case, "preset": "tiny"}, metrics=found)
    return 0 if tally.torn == tally.lost == tally.failed == 0 and tally.trials >= options.at_least else 1


def kill_exports(directory: Path, trials: int, seconds: float, at_least: int) -> Tally:
    """Kill `trials` exports, or as many as fit into `seconds` (but at least `at_least`)."""
    state = directory / "tally.json"
    tally = Tally(**json.loads(state.read_text())) if state.is_file() else Tally()
    dice = random.Random(tally.trials)
    kills.in_fork(partial(kills.run, _config(directory, -1), "export"), None)  # fills the cache, so that the next takes the time of any
    _, undisturbed_s = kills.in_fork(partial(kills.run, _config(directory, -6), "export"), None)
    print(f"export_kills: an undisturbed run takes {undisturbed_s:.1f} s", flush=True)
    started, done = time.monotonic(), 0
    while tally.trials < trials and (done < at_least or time.monotonic() - started < seconds):
        cfg = _config(directory, tally.trials)
        kills.in_fork(partial(kills.run, cfg, "export"), dice.uniform(0.05, 1.0) * undisturbed_s)
        torn = not kills.whole_or_absent(cfg, "export")
        code, _ = kills.in_fork(partial(kills.run, cfg, "export"), None) if done % 5 == 4 else (0, 0.0)
        tally = tally._replace(trials=tally.trials + 1, torn=tally.torn + torn, failed=tally.failed + (code != 0))
        artifacts.write_whole(state, json.dumps(tally._asdict()).encode())
        done += 1
        print(f"export_kills {tally.trials}: {'TORN' if torn else 'whole or absent'}", flush=True)
    return tally


def _config(directory: Path, trial: int) -> Config:
    """Every trial has a key of its own, so that it has work to do."""
    return load("tiny", [f"export.sampling.num_predict={1000 + trial}", f"paths.output={directory}", f"paths.cache={directory / 'cache'}"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
