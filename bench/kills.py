"""Kill -9 a train again and again on its way: every resume must end where the undisturbed run does, to the last bit.

One run of ten steps is killed at random moments until it is through, at most FEW times; then it must finish. A trial is one kill. In
turn: a checkpoint after every step, so that many kills fall into its writing; after every third; and after every second with a
mirror, where some kills take the whole local directory along, as a machine that vanishes does.

Checked after each kill: whatever bears a checkpoint's name is whole (files and hashes); no published directory is torn; a mirror
that had a whole slot still has one; every loss so far is the undisturbed run's; at most `every_steps` steps are made again. And at
the end of each run: losses, validation losses and both adapters' bytes.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from trainer import artifacts, pipeline
from trainer.config import Config, load
from trainer.errors import ArtifactError
from trainer.training import checkpoints, mirror

FEW = 6
EVERY = (1, 3, 2)
"""Steps between two checkpoints, in turn; with the last there is a mirror."""
FASTER = (
    "train.max_steps=10", "train.batch_records=1", "train.tokens_per_step=1", "train.gradient_checkpointing=false", "train.valid_every=5",
    "train.valid_records=4",
)  # fmt: skip


class Tally(NamedTuple):
    trials: int = 0
    """Kills that met a living run."""
    torn: int = 0
    """After which something that reads as whole was not."""
    lost: int = 0
    """After which more steps were lost than lie between two checkpoints."""
    failed: int = 0
    """Runs that did not finish by themselves, or not with the bits of the undisturbed one."""
    runs: int = 0
    amid_write: int = 0
    """Kills that left a checkpoint, a copy or an adapter half written."""
    vanished: int = 0
    """Kills with which the local directory went, and the mirror stayed."""
    most_repeated: int = 0


class Result(NamedTuple):
    """What two equal trainings have in common."""

    losses: dict[int, float]
    valid: dict[int, float]
    adapters: tuple[bytes, ...] = ()


def kill_trains(directory: Path, trials: int, seconds: float, at_least: int) -> Tally:
    """Until there were `trials` kills, those of earlier calls included, or for `seconds`, but `at_least` so many now."""
    state = directory / "tally.json"
    tally = Tally(**json.loads(state.read_text())) if state.is_file() else Tally()
    plain = configured(directory, "undisturbed", 100)
    shutil.rmtree(plain.run_dir, ignore_errors=True)
    assert in_fork(partial(run, plain, "prepare"), None)[0] == 0
    in_fork(partial(run, plain, "train"), None)  # fills the cache, so that the next one takes the time of any
    shutil.rmtree(plain.run_dir / "train", ignore_errors=True)
    code, undisturbed_s = in_fork(partial(run, plain, "train"), None)
    assert code == 0, "the undisturbed run failed"
    expected = read(plain.run_dir / "train")
    print(f"train_kills: an undisturbed run takes {undisturbed_s:.1f} s", flush=True)
    started, before = time.monotonic(), tally.trials
    while tally.trials < trials and (tally.trials - before < at_least or time.monotonic() - started < seconds):
        tally = one_run(directory, tally, undisturbed_s, expected)
        artifacts.write_whole(state, json.dumps(tally._asdict()).encode())
        print(f"train_kills: {tally}", flush=True)
    return tally


def one_run(directory: Path, tally: Tally, undisturbed_s: float, expected: Result) -> Tally:
    """One training from its first step to its end, with up to FEW kills."""
    every = EVERY[tally.runs % len(EVERY)]
    cfg, dice = configured(directory, "killed", every, mirrored=every == EVERY[-1]), random.Random(tally.runs)
    for left in ("train", "train.partial", "train.old"):
        shutil.rmtree(cfg.run_dir / left, ignore_errors=True)
    if cfg.checkpoint.mirror:
        shutil.rmtree(cfg.checkpoint.mirror, ignore_errors=True)
        cfg.checkpoint.mirror.mkdir(parents=True)
    for _ in range(FEW):
        code, _ = in_fork(partial(run, cfg, "train"), dice.uniform(0.1, 1.0) * undisturbed_s)
        if code != -signal.SIGKILL:
            break
        tally = judged(cfg, tally, expected)
        if cfg.checkpoint.mirror and dice.random() < 0.5 and (cfg.run_dir / "train.partial").exists():
            shutil.rmtree(cfg.run_dir / "train.partial")
            tally = tally._replace(vanished=tally.vanished + 1)
    code, _ = in_fork(partial(run, cfg, "train"), None)
    found = read(cfg.run_dir / "train") if code == 0 else Result({}, {})
    equal = code == 0 and found == expected
    if not equal:
        same = [name for name, one, other in zip(Result._fields, found, expected, strict=True) if one == other]
        print(f"train_kills: run {tally.runs} ended with {code}; equal are {same}, wanted all three", file=sys.stderr)
    return tally._replace(runs=tally.runs + 1, failed=tally.failed + (not equal))


def judged(cfg: Config, tally: Tally, expected: Result) -> Tally:
    """One more kill, and what it left."""
    out = cfg.run_dir / "train.partial"
    amid = any(found for folder in (out, out / "checkpoints") for found in half_written(folder)) or any(torn_slots(cfg))
    found = checkpoints.every(out / "checkpoints")
    newest = checkpoints.step_of(found[-1]) if found else 0
    events = read(out) if out.is_dir() else Result({}, {})
    reached = max(events.losses, default=0)
    repeated = max(0, reached - newest)
    done = (out / artifacts.RECORD).exists()  # then the checkpoints were being deleted, and recover() publishes what is there
    problems = [f"{path.name} is not whole" for path in found if not done and checkpoints.whole(path) is None]
    problems += [] if events.losses.items() <= expected.losses.items() else ["losses differ"]
    problems += [] if events.valid.items() <= expected.valid.items() else ["validation losses differ"]
    problems += [] if whole_or_absent(cfg, "train") else ["a published directory is torn"]
    # The first slot may be the one that was being written, and the copy comes after the checkpoint.
    if cfg.checkpoint.mirror and newest > 2 * cfg.checkpoint.every_steps and len(list(torn_slots(cfg))) == len(mirror.SLOTS):
        problems.append("no whole slot in the mirror")
    for problem in problems:
        print(f"train_kills {tally.trials}: {problem}", file=sys.stderr)
    return tally._replace(
        trials=tally.trials + 1,
        torn=tally.torn + bool(problems),
        lost=tally.lost + (not done and repeated > cfg.checkpoint.every_steps),
        amid_write=tally.amid_write + amid,
        most_repeated=max(tally.most_repeated, 0 if done else repeated),
    )


def half_written(folder: Path) -> Iterator[Path]:
    """What is on its way to a name of its own, or was on its way out."""
    for pattern in ("partial", "*.gone", "*.new", "*.old", "restoring"):
        yield from folder.glob(pattern)


def torn_slots(cfg: Config) -> Iterator[str]:
    """Slots that were begun and are not whole now."""
    if cfg.checkpoint.mirror:
        folder = cfg.checkpoint.mirror / cfg.run.name
        yield from (name for name in mirror.SLOTS if (folder / f"{name}.json").exists() and not mirror.is_whole(folder, name))


def read(train: Path) -> Result:
    """Of a finished train, or of one on its way: then without adapters."""
    file = train / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    events = [json.loads(line) for line in lines]
    losses, valid = ({event["step"]: event[name] for event in events if name in event} for name in ("loss", "valid_loss"))
    weights = [train / name / "adapter_model.safetensors" for name in ("adapter", "best")]
    return Result(losses, valid, tuple(path.read_bytes() for path in weights) if train.suffix != ".partial" else ())


def configured(directory: Path, name: str, every: int, *, mirrored: bool = False) -> Config:
    copied = [f"checkpoint.mirror={directory / 'mirror'}"] if mirrored else []
    where = [f"paths.output={directory}", f"paths.cache={directory / 'cache'}", f"run.name={name}", f"checkpoint.every_steps={every}"]
    return load("tiny", [*FASTER, *where, *copied])


def run(cfg: Config, stage: str) -> None:
    import torch

    torch.set_num_threads(1)  # of two layers: threads only wait for each other
    pipeline.run(cfg, stage, None)


def whole_or_absent(cfg: Config, stage: str) -> bool:
    """Reads every stage's directory as the next command would, without any memory of hashes."""
    with artifacts.lock(cfg.run_dir):
        artifacts.recover(cfg.run_dir)
        hashes = artifacts.Hashes(cfg.run_dir / "no-memo.json")
        try:
            for item in pipeline.order(stage):
                artifacts.read(cfg.run_dir / item.name, item.facts, hashes)
        except ArtifactError as error:
            print(error, file=sys.stderr)
            return False
    return True


def in_fork(work: Callable[[], None], kill_after_s: float | None) -> tuple[int, float]:
    """Run `work` in a fork; kill it after a while, or wait. Returns its exit code (negative: signal) and the time it took."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            code = 0
        finally:
            if code:
                traceback.print_exc()  # else _exit would swallow it
            sys.stderr.flush()
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def import_heavy() -> None:
    """All that a train imports, and nothing of it run: threads do not survive a fork."""
    for name in ("torch", "transformers", "bitsandbytes", "peft", "trl", "datasets", "trainer.training.loop", "trainer.backends.trl"):
        __import__(name)
    gc.freeze()  # accelerate collects at every start, and 400,000 objects of imports take it a second
