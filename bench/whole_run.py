"""The main job at its real size: every stage as its own command on one machine, a row a stage; at last llama.cpp answers from the release.

    python -m bench.whole_run --model DIR                                    # gemma3-12b-t4 on the sample data, ten steps, a T4's memory
    python -m bench.whole_run --model random:tiny --preset tiny --cap-bytes 0 --steps 4

DIR holds a Gemma 3 in the hub's layout (python -m trainer.random_weights DIR --size 12b --device cuda). Random weights answer nonsense, so
the verification's limits only warn, and the release's manifest says that they were waived. For the same reason the last row loads the
GGUF itself: the gateway would refuse a model whose answers do not end.

wall_s is a command's, from start to end. peak_bytes: what the card's process held at most (nvidia-smi, four times a second: torch's
allocator, the CUDA context and everything beside them). peak_rss_bytes: the largest VmHWM of any of the command's processes. disk_bytes: what
output and cache hold after the stage; peak_disk_bytes: at most meanwhile. --cap-bytes is what torch's allocator may take of the card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import demo, oom_ladder, rows
from trainer.backends import llamacpp

BENCH = "whole_run"
STAGES = ("prepare", "train", "evaluate", "export", "verify", "release", "report")
POLL_S = 0.25
ANSWER_TOKENS = 24


class Used(NamedTuple):
    """At most, while a command ran; bytes."""

    card: int = 0
    rss: int = 0
    disk: int = 0

    def most(self, other: Used) -> Used:
        return Used(*map(max, self, other))


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if not options.resume:
        shutil.rmtree(options.output, ignore_errors=True)
    environment = oom_ladder.capped(options.cap_bytes) if options.cap_bytes else dict(os.environ)
    for stage in STAGES:
        if options.resume and measured(options, stage):
            continue
        command = [sys.executable, "-m", "trainer", stage, "--preset", options.preset, *settings(options)]
        print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
        code, wall_s, used = watched(command, environment, (options.output, options.cache))
        if code:
            print(f"whole_run: {stage} ended with {code}; the lines above say why", file=sys.stderr)
            return int(code)
        keep(options, stage, wall_s, used)
    started = time.monotonic()
    question, said = answered(options.output / "gguf" / "current")
    keep(options, "answer", time.monotonic() - started, Used(), {"question": question, "answer": said})
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="directory in the hub's layout, or random:tiny")
    made.add_argument("--preset", default="gemma3-12b-t4")
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--cap-bytes", type=int, default=15_600_000_000, help="what torch may take of the card; 0 is all of it")
    made.add_argument("--output", type=Path, default=rows.ROOT / "output" / "bench-whole-run")
    made.add_argument("--cache", type=Path, default=rows.ROOT / ".cache")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    made.add_argument("--resume", action="store_true", help="go on with what is in --output: a stage that is there gets no row")
    made.add_argument("--out", type=Path, default=None, help="file to append to, instead of the one in bench/results/")
    made.add_argument("--run", default=None, metavar="ID")
    return made


def settings(options: argparse.Namespace) -> list[str]:
    forced = [
        f"model.name={options.model}",
        "data.path=data/sample.jsonl",
        f"train.max_steps={options.steps}",
        "evaluate.max_records=8",
        "evaluate.reference_records=8",
        "evaluate.max_new_tokens=16",
        "train.valid_records=8",
        "verify.kl=warn",
        f"paths.output={options.output}",
        f"paths.cache={options.cache}",
        *options.set,
    ]
    return [f"--set={text}" for text in forced]


def watched(command: Sequence[str], environment: Mapping[str, str], places: Sequence[Path]) -> tuple[int, float, Used]:
    """Exit code, seconds, and the most that the command and its children used."""
    started, used, before = time.monotonic(), Used(), card_used()
    with subprocess.Popen(command, cwd=rows.ROOT, env=environment) as process:
        while process.poll() is None:
            time.sleep(POLL_S)
            rss = max((high_water(pid) for pid in family(process.pid)), default=0)
            used = used.most(Used(card_used() - before, rss, held(places)))
    return process.returncode, time.monotonic() - started, used.most(Used(disk=held(places)))


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it, whichever thread started them."""
    yield pid
    try:
        children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text(encoding="ascii").split()]
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def high_water(pid: int) -> int:
    """VmHWM; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def card_used() -> int:
    """Bytes that are given out on the card in use; 0 without one."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20
    except (OSError, subprocess.CalledProcessError):
        return 0


def held(places: Sequence[Path]) -> int:
    """Bytes on the disk under these directories; a file of several names counts once."""
    files: dict[tuple[int, int], int] = {}
    for place in places:
        for directory, _, names in os.walk(place):
            for name in names:
                try:
                    found = (Path(directory) / name).lstat()
                except FileNotFoundError:
                    continue
                files[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(files.values())


def keep(options: argparse.Namespace, stage: str, wall_s: float, used: Used, more: Mapping[str, Any] | None = None) -> None:
    work = {"preset": options.preset, "stage": stage, "cap_bytes": options.cap_bytes or None, "steps": options.steps}
    metrics = {
        "wall_s": wall_s,
        "peak_bytes": used.card,
        "peak_rss_bytes": used.rss,
        "disk_bytes": held((options.output, options.cache)),
        "peak_disk_bytes": used.disk,
        "facts": measured(options, stage),
        **(more or {}),
    }
    rows.append(BENCH, "ours", work, metrics, options.out, options.run)
    told = {key: value for key, value in metrics.items() if key != "facts"}
    print(json.dumps({"stage": stage, **told}, ensure_ascii=False), flush=True)


def measured(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    """What the stage itself counted, as far as it is a number or a word."""
    found = sorted(options.output.glob(f"runs/*/{stage}/artifact.json"))
    facts = json.loads(found[0].read_text(encoding="utf-8"))["facts"] if found else {}
    return {key: value for key, value in facts.items() if isinstance(value, int | float | str)}


def answered(release: Path) -> tuple[str, str]:
    """The first probe's question and what the release's GGUF, loaded by the embedded engine, says to it."""
    probe = demo.first_probe(release / "probes.jsonl")
    gguf = release / json.loads((release / "manifest.json").read_text(encoding="utf-8"))["files"]["gguf"]["path"]
    with llamacpp.Engine(gguf, num_ctx=2048, threads=len(os.sched_getaffinity(0))) as engine:
        said = engine.complete(probe["prompt_ids"], ANSWER_TOKENS)
    return probe["messages"][-1]["content"], said.text


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
