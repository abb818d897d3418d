"""The smoke test of a T4, whole on a CPU with the tiny model; and what it says where there is no card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import qdora_step, smoke_t4
from trainer import cards

TINY = ("--preset", "tiny", "--model", "random:tiny", "--device", "cpu", "--tokens", "64", "--warmup", "1")


def test_three_steps_make_one_row_with_the_plan_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert smoke_t4.main([*TINY, "--cache", str(tmp_path / "cache"), "--out", str(out)]) == 0
    (line,) = out.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert list(row) == ["bench", "who", "work", "metrics", "hardware", "versions", "commit", "run"]
    assert (row["bench"], row["who"], row["work"]["weights"], row["work"]["card"]) == ("smoke_t4", "ours", "random", None)
    assert {"adapter", "mode", "tokens", "rank", "optimizer", "cap_bytes", "keep_bytes", "preset"} <= row["work"].keys()
    metrics = row["metrics"]
    assert (metrics["outcome"], metrics["steps"], metrics["skipped_steps"]) == ("ok", 3, 0)
    assert 0 < metrics["step_s"] < 60
    assert metrics["predicted_bytes"] > 1e6
    assert metrics["predicted_reserved_bytes"] >= metrics["predicted_bytes"]
    said = capsys.readouterr().out
    assert "send this back" in said
    assert json.loads(said.splitlines()[-1]) == row
    assert "plan" in said


def test_its_step_is_the_presets_own_and_the_roofline_is_of_the_same_config() -> None:
    options = smoke_t4.parser().parse_args(["--model", "unsloth/gemma-3-12b-it"])
    cfg = qdora_step.config(options, options.warmup + options.steps + 1)
    work = smoke_t4.work(cfg, options, cards.Card("GPU-0", "Tesla T4", 15_828_320_256))
    assert (work["tokens"], work["rank"], work["adapter"], work["weights"], work["card"]) == (4096, 64, "dora", "real", "Tesla T4")
    foretold = smoke_t4.forecast(cfg)
    assert foretold["t4_peak_s"] < foretold["t4_sustained_s"]
    assert foretold["t4_sustained_s"] == pytest.approx(13.5, rel=0.15), "what bench.t4_roofline counted"
    assert foretold["predicted_reserved_bytes"] < smoke_t4.T4_BYTES


@pytest.mark.skipif(cards.count() > 0, reason="there is a card here")
def test_without_a_card_it_says_what_is_missing_and_where_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke_t4.main([]) == 2
    said = capsys.readouterr().err
    assert "no NVIDIA card" in said
    assert "make doctor" in said


def test_real_weights_are_taken_where_training_left_them(tmp_path: Path) -> None:
    options = smoke_t4.parser().parse_args(["--model", "", "--cache", str(tmp_path)])
    state = tmp_path / "nf4" / "gemma-3-12b-it-float16-0123456789ab"
    state.mkdir(parents=True)
    (state / "nf4.json").write_text("{}")
    assert smoke_t4.weights(options) == "unsloth/gemma-3-12b-it"


def test_random_weights_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    options = smoke_t4.parser().parse_args(["--model", "", "--cache", str(tmp_path)])
    made = tmp_path / "random-12b"
    made.mkdir()
    (made / "config.json").write_text("{}")
    assert smoke_t4.weights(options) == str(made)


def test_out_of_memory_is_told_in_the_table() -> None:
    metrics = {"outcome": "out_of_memory", "steps": 0, "skipped_steps": 0, "step_s": None, "peak_bytes": 15_000_000_000}
    assert "15.00 GB" in smoke_t4.table(metrics, "Tesla T4")
    assert "out_of_memory" in smoke_t4.table(metrics, "Tesla T4")
