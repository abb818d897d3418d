"""The bench of the plan's forecasts, whole, on a CPU with the tiny model; its settings; its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plan_accuracy
from trainer.gemma3 import SIZES
from trainer.planner.budget import budget

TINY = ["--preset", "tiny", "--model", "random:tiny", "--device", "cpu"]


@pytest.fixture
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # two busy cores are slower than one at this size


def parsed(*arguments: str) -> Any:
    return plan_accuracy.parser().parse_args(["--model", "google/gemma-3-12b-it", *arguments])


def test_twelve_settings_and_more_cover_what_moves_memory_half_of_them_to_fit_on() -> None:
    configs = {name: plan_accuracy.config(name, parsed()) for name in plan_accuracy.SETTINGS}
    halves = [setting.half for setting in plan_accuracy.SETTINGS.values()]
    assert len(configs) >= 12
    assert halves.count("fit") == halves.count("test")
    assert {cfg.adapter.rank for cfg in configs.values()} == {16, 64, 128}
    assert {cfg.data.max_tokens for cfg in configs.values()} >= {1024, 4096, 16384}
    assert {cfg.adapter.dora for cfg in configs.values()} == {True, False}
    assert {cfg.model.dtype for cfg in configs.values()} == {"float16", "bfloat16"}
    assert {cfg.train.optimizer for cfg in configs.values()} == {"adamw8bit", "adamw32"}


def test_one_of_them_is_meant_to_be_too_large_for_a_t4() -> None:
    fits = {
        name: budget(plan_accuracy.config(name, parsed()), SIZES["12b"]).reserved_bytes <= 15_600_000_000 for name in plan_accuracy.SETTINGS
    }
    assert not fits["r128-t16384-adamw32"]
    assert sum(fits.values()) >= 12


@pytest.mark.usefixtures("one_thread")
def test_settings_run_one_after_the_other_on_one_base_and_only_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = [*TINY, "--cache", str(tmp_path / "cache"), "--out", str(out), "--steps", "1", "--run", "one"]
    assert plan_accuracy.main([*arguments, "--configs", "lora,keep-passes"]) == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["work"]["setting"] for row in written] == ["lora", "keep-passes"]
    for row in written:
        assert (row["bench"], row["who"], row["run"], row["metrics"]["outcome"]) == ("plan_accuracy", "ours", "one", "ok")
        assert row["metrics"]["predicted_bytes"] > 0
        assert row["metrics"]["error"] is None, "a CPU has no allocator that counts"
        assert row["work"]["half"] == plan_accuracy.SETTINGS[row["work"]["setting"]].half
    assert [row["work"]["adapter"] for row in written] == ["lora", "dora"]
    assert written[1]["work"]["accumulation"] == 2
    assert plan_accuracy.main([*arguments, "--configs", "lora,keep-passes"]) == 0
    assert "in the file already" in capsys.readouterr().out
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.usefixtures("one_thread")
def test_the_base_is_the_same_before_and_after_a_setting(tmp_path: Path) -> None:
    import torch

    from trainer.training import model

    cfg = plan_accuracy.config("r16", plan_accuracy.parser().parse_args([*TINY, "--cache", str(tmp_path)]))
    base = model.base(cfg, model.nf4(cfg))
    ids = torch.arange(10, 40)[None]
    layers = [type(layer) for layer in base.model.layers]
    before = base(ids).logits
    assert plan_accuracy._run(cfg, base, SIZES["tiny"], passes=1, steps=1).outcome == "ok"
    assert [type(layer) for layer in base.model.layers] == layers
    assert torch.equal(base(ids).logits, before)
    assert not [name for name, _ in base.named_parameters() if "lora" in name]


def test_a_setting_that_nobody_knows_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_accuracy.main([*TINY, "--configs", "r16,r17"]) == 2
    assert "no setting r17" in capsys.readouterr().err


def row(setting: str, half: str, predicted: int, measured: int, *, fits: bool = True, outcome: str = "ok") -> dict[str, Any]:
    error = predicted / measured - 1 if outcome == "ok" else None
    metrics = {"error": error, "reserved_error": error, "predicted_fits": fits, "outcome": outcome}
    return {"work": {"setting": setting, "half": half}, "metrics": metrics}


def test_the_report_names_what_is_beyond_the_limits_and_every_wrong_verdict() -> None:
    told = plan_accuracy.report(
        [
            row("a", "fit", 101, 100),
            row("b", "test", 96, 100),
            row("c", "test", 107, 100),
            row("d", "test", 200, 100, fits=False, outcome="out_of_memory"),
            row("e", "fit", 100, 100, fits=False),
        ]
    )
    assert told["fit"]["rows"] == 2
    assert told["test"]["allocated"]["beyond"] == ["b", "c"]
    assert told["test"]["reserved"]["beyond"] == ["b"]
    assert told["test"]["allocated"]["errors"] == [pytest.approx(-0.04), pytest.approx(0.07)]
    assert told["wrong_verdicts"] == ["e"]
