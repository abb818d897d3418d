"""`python -m trainer train` as a person has it: interrupted, started twice, on a disk that cannot be written."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import artifacts
from trainer.config import Config, load
from trainer.training import checkpoints


def settings(directory: Path, cache: Path) -> list[str]:
    return ["train.max_steps=60", "checkpoint.every_steps=1000", f"paths.output={directory / 'output'}", f"paths.cache={cache}"]


def started(values: list[str], root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "train", "--preset", "tiny", *(part for value in values for part in ("--set", value))]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reached(cfg: Config, step: int) -> bool:
    metrics = cfg.run_dir / "train.partial" / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


@pytest.mark.slow
def test_a_signal_ends_with_130_and_a_checkpoint_and_the_same_command_goes_on(tiny_cache: Path, root: Path, tmp_path: Path) -> None:
    """And needs no 16-bit file for it: the shards are gone when it starts again."""
    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    values = settings(tmp_path, cache)
    cfg = load("tiny", values)
    child = started(values, root)
    while not reached(cfg, 3):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, said = child.communicate()
    assert child.returncode == 130 and time.monotonic() - asked < 30
    assert len(said.strip().splitlines()) == 1 and "the same command goes on from there" in said
    (saved,) = checkpoints.every(cfg.run_dir / "train.partial" / "checkpoints")
    assert checkpoints.whole(saved) and checkpoints.step_of(saved) >= 3
    shards = list((cache / "models").rglob("*.safetensors"))
    assert shards
    for shard in shards:
        shard.unlink()
    child = started(values, root)
    said, wrong = child.communicate()
    assert child.returncode == 0, wrong
    assert f"train: going on from step {checkpoints.step_of(saved)}" in said
    assert not any(shard.exists() for shard in shards)
    assert artifacts.read_label(cfg.run_dir / "train") is not None


def test_a_second_trainer_on_one_run_is_refused(tiny_cache: Path, root: Path, tmp_path: Path) -> None:
    values = settings(tmp_path, tiny_cache)
    with artifacts.lock(load("tiny", values).run_dir):
        child = started(values, root)
        _, said = child.communicate()
    assert child.returncode == 2
    assert "is in use by another trainer" in said and "--set run.name=OTHER" in said and "Traceback" not in said


def test_an_output_that_cannot_be_written_is_one_clear_error(tiny_cache: Path, root: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        child = started(settings(disk, tiny_cache), root)
        _, said = child.communicate()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert child.returncode == 2
    assert "cannot be written (Read-only file system)" in said and "--set paths.output=DIR" in said and "Traceback" not in said


def test_no_decision_reads_the_wall_clock(root: Path) -> None:
    """It may be set back. Durations come from time.monotonic; what is newest is counted in steps."""
    found = [
        f"{path.name}: {word}"
        for path in [*(root / "trainer" / "training").glob("*.py"), *(root / "trainer").glob("*.py")]
        for word in ("time.time(", "datetime.now", "st_ctime", "getmtime")
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []
