"""The benches of a step, whole, on a CPU with the tiny model; and what their options make of the config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import qdora_step, rows, t4_roofline

TINY = ("--preset", "tiny", "--model", "random:tiny", "--device", "cpu", "--tokens", "64", "--warmup", "2")
BIG = ("--model", "somewhere")


def parsed(*arguments: str) -> tuple[dict[str, Any], Any]:
    options = qdora_step.parser("").parse_args(arguments)
    cfg = qdora_step.config(options, 8)
    return qdora_step.work(cfg, options), cfg


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def ran(main: Any, out: Path, cache: Path, arguments: Sequence[str]) -> dict[str, Any]:
    assert main([*TINY, "--cache", str(cache), "--out", str(out), *arguments]) == 0
    row: dict[str, Any] = json.loads(out.read_text(encoding="utf-8").splitlines()[-1])
    return row


def test_the_peer_is_unsloth_as_it_is() -> None:
    work, cfg = parsed(*BIG, "--who", "unsloth")
    assert (work["adapter"], work["without"], work["backend"], work["keep_bytes"]) == ("lora", None, "unsloth", 0)
    assert {getattr(cfg.kernels, piece) for piece in qdora_step.PIECES if piece != "loss"} == {"stock"}
    assert parsed(*BIG, "--who", "unsloth", "--set", "adapter.dora=true")[0]["adapter"] == "dora"


def test_work_says_what_ran_not_what_was_asked_first() -> None:
    ours = ("--set", "kernels.layer=ours")
    work, cfg = parsed(*BIG, *ours, "--keep-bytes", "5", "--keep-pinned-bytes", "7", "--accumulation", "4")
    assert (work["adapter"], work["without"], work["keep_bytes"], work["keep_pinned_bytes"]) == ("dora", None, 5, 7)
    assert cfg.train.tokens_per_step == 4 * 4096
    assert parsed(*BIG, *ours, "--keep-bytes", "5", "--set", "kernels.keep_bytes=6")[0]["keep_bytes"] == 6


def test_a_piece_switched_off_is_named() -> None:
    work, cfg = parsed(*BIG, "--set", "kernels.layer=ours", "--without", "attention")
    assert (work["without"], cfg.kernels.attention) == ("attention", "stock")


def test_bf16_is_a_mode_of_its_own() -> None:
    work, cfg = parsed(*BIG, "--mode", "bf16")
    assert (work["mode"], cfg.model.dtype) == ("bf16", "bfloat16")


def test_a_step_is_measured_on_the_loop_of_train(tmp_path: Path, cache: Path) -> None:
    row = ran(qdora_step.main, tmp_path / "rows.jsonl", cache, ["--steps", "2", "--run", "one"])
    metrics = row["metrics"]
    assert (row["bench"], row["who"], row["run"]) == ("qdora_step", "ours", "one")
    assert (metrics["outcome"], metrics["steps"]) == ("ok", 2)
    assert 0 < metrics["step_s"] < 60
    assert metrics["first_step_s"] > 0
    assert metrics["skipped_steps"] == 0
    assert metrics["compiles"] == 0
    assert metrics.keys() >= {"kernel_s", "peak_bytes", "reserved_bytes", "pinned_bytes", "kernels", "forbidden"}


def test_a_step_without_an_update_is_no_measured_step() -> None:
    journal: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0, "grad_norm": None},
        {"step": 2, "loss": 2.0, "grad_norm": 1.0},
        {"step": 2, "valid_loss": 2.0},
    ]
    assert qdora_step.Measured("ok", None, journal).skipped() == {1}
    watch = qdora_step.Watch(0, 2, "cpu", profiled=False)
    for step in range(3):
        watch.after_step(step)
    assert watch.metrics(set())["steps"] == 2
    assert watch.metrics({1})["steps"] == 1
    assert watch.metrics({1, 2})["step_s"] is None


@pytest.mark.parametrize("how", ["packed", "unpacked"])
def test_mixed_lengths_give_tokens_a_second(how: str, tmp_path: Path, cache: Path) -> None:
    row = ran(qdora_step.main, tmp_path / "rows.jsonl", cache, ["--mixed", how, "--steps", "3"])
    assert row["work"]["packed"] == (how == "packed")
    assert "lognormal" in row["work"]["mix"]
    assert 3 * 50 <= row["metrics"]["num_tokens"] <= 3 * 64
    assert row["metrics"]["tokens_per_s"] > 0
    assert row["metrics"]["kernel_s"] is None


def test_the_roofline_counts_a_step(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "operations.json"
    row = ran(t4_roofline.main, tmp_path / "rows.jsonl", cache, ["--kernels", str(file)])
    metrics, operations = row["metrics"], json.loads(file.read_text(encoding="utf-8"))["operations"]
    assert row["bench"] == "t4_roofline"
    assert metrics["tensor_flops"] == 0.0, "float32 on a CPU"
    assert metrics["fp32_flops"] > 3 * 2 * 64 * 1e5, "forward, dX and the head at least"
    assert metrics["bytes_moved"] > 1e6
    assert metrics["t4_sustained_s"] == pytest.approx(metrics["t4_peak_s"])
    assert sum(one["fp32_flops"] for one in operations) == metrics["fp32_flops"]
    assert {"aten::mm", "aten::mul"} <= {one["name"] for one in operations}


def test_twice_the_tokens_are_twice_the_products(tmp_path: Path, cache: Path) -> None:
    """All but attention and what does not depend on tokens: norms of DoRA."""
    plain = ["--set", "adapter.dora=false"]
    found = [
        ran(t4_roofline.main, tmp_path / "rows.jsonl", cache, [*plain, "--tokens", tokens])["metrics"]["fp32_flops"]
        for tokens in ("64", "128")
    ]
    assert 1.9 < found[1] / found[0] < 2.3


def test_a_roofline_of_mixed_lengths_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        t4_roofline.main([*TINY, "--mixed", "packed"])
    assert "one document" in capsys.readouterr().err


def test_rows_of_several_commands_may_share_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    own = rows.append("x", "ours", {}, {}, path)["run"]
    monkeypatch.setenv("TRINITY_RUN", "shared")
    assert rows.append("x", "ours", {}, {}, path)["run"] == "shared" != own
    assert rows.append("x", "ours", {}, {}, path, "given")["run"] == "given"
