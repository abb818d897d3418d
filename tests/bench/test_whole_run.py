"""The bench of the whole way: its settings, what it sees of a command's children, and the way itself with the tiny model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from bench import whole_run
from trainer import pipeline
from trainer.config import load

HOLDS_200_MB = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep(1)"


def test_its_stages_are_the_pipelines_own_in_their_order() -> None:
    assert list(whole_run.STAGES) == [stage.name for stage in pipeline.STAGES if stage.name != "plan"]


def test_its_settings_are_ones_that_the_12b_knows() -> None:
    options = whole_run.parser().parse_args(["--model", "somewhere"])
    cfg = load(options.preset, [text.removeprefix("--set=") for text in whole_run.settings(options)])
    assert (cfg.train.max_steps, cfg.evaluate.max_records, cfg.evaluate.max_new_tokens) == (10, 8, 16)
    assert (cfg.adapter.rank, cfg.data.max_tokens, cfg.adapter.dora) == (64, 4096, True), "the main job, not a smaller one"


def test_the_largest_of_a_commands_processes_is_seen_and_so_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS_200_MB!r}])"
    (tmp_path / "one").write_bytes(os.urandom(1_000_000))
    os.link(tmp_path / "one", tmp_path / "two")
    code, wall_s, used = whole_run.watched([sys.executable, "-c", child], dict(os.environ), (tmp_path,))
    assert code == 0
    assert wall_s >= 1
    assert 200e6 < used.rss < 400e6
    assert 1_000_000 <= used.disk < 1_100_000, "a file of two names counts once"


@pytest.mark.slow
def test_the_tiny_model_goes_the_whole_way_and_leaves_a_row_a_stage(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    where = ["--output", str(tmp_path / "output"), "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert whole_run.main(["--model", "random:tiny", "--preset", "tiny", "--cap-bytes", "0", "--steps", "2", *where]) == 0
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["work"]["stage"] for row in found] == [*whole_run.STAGES, "answer"]
    assert all(row["metrics"]["wall_s"] > 0 for row in found)
    assert found[1]["metrics"]["facts"]["steps"] == 2
    assert found[-1]["metrics"]["answer"]
