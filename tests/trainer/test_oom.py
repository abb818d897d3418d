from __future__ import annotations

from pathlib import Path

import pytest

from trainer import oom
from trainer.config import Config, load
from trainer.oom import EXPANDABLE, Attempt, Lost


def walk(cfg: Config, allocator: str = EXPANDABLE) -> list[oom.Step]:
    """Every rung from the top to the end."""
    steps: list[oom.Step] = []
    while (step := oom.climb(cfg, steps[-1].attempt if steps else Attempt(), allocator)) is not None:
        steps.append(step)
    return steps


def test_the_product_gives_up_speed_first_and_then_the_seeds_three_in_order() -> None:
    assert [step.change for step in walk(load("gemma3-12b-t4"))] == [
        "kernels.keep_bytes 2500000000 -> 0",
        "kernels.mlp_tile_tokens 2048 -> 1024",
        "kernels.pin_gradients false -> true",
        "kernels.keep_pinned_bytes 2500000000 -> 0",
        "data.max_tokens 4096 -> 2048",
        "adapter.rank 64 -> 32",
        "adapter.dora true -> false",
    ]


def test_stock_parts_are_replaced_before_anything_else() -> None:
    stock = ("kernels.layer=stock", "kernels.loss=stock", "kernels.offload=stock", "train.gradient_checkpointing=false")
    changes = [step.change.split()[0] for step in walk(load("gemma3-12b-t4", stock))]
    assert changes[:3] == ["kernels.layer", "kernels.loss", "kernels.offload"]
    on_cpu = [step.change.split()[0] for step in walk(load("tiny", [*stock, "kernels.layer=ours"]))]
    assert on_cpu[:4] == ["kernels.loss", "train.batch_records", "kernels.mlp_tile_tokens", "kernels.span_layers"]


def test_the_allocator_comes_first_where_it_leaves_holes() -> None:
    first = walk(load("gemma3-12b-t4"), "max_split_size_mb:64")[0]
    assert first.attempt.allocator == f"max_split_size_mb:64,{EXPANDABLE}" and not first.rung.quality


@pytest.mark.parametrize("preset", ["gemma3-12b-t4", "gemma3-270m-cpu", "tiny"])
def test_quality_goes_last_and_only_another_adapter_starts_anew(preset: str) -> None:
    steps = walk(load(preset))
    assert [step.rung.quality for step in steps] == sorted(step.rung.quality for step in steps)
    assert [step.change.split()[0] for step in steps if step.rung.anew] == ["adapter.rank", "adapter.dora"]


def test_tokens_of_a_step_are_never_touched_and_the_config_stays_as_it_was() -> None:
    cfg = load("gemma3-12b-t4")
    last = walk(cfg)[-1].attempt
    now = last.in_force(cfg)
    assert (now.data.max_tokens, now.adapter.rank, now.adapter.dora) == (2048, 32, False)
    assert now.train == cfg.train and cfg.adapter.rank == 64
    assert Config.model_validate(now.model_dump()) == now, "every rung is a config that could be written by hand"
    assert len(last.rungs) == 7 and all("; costs: " in line for line in last.rungs)


def test_an_attempt_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert oom.read(tmp_path) == Attempt()
    step = walk(load("gemma3-12b-t4"))[4]
    oom.write(tmp_path, step, oom.told(step, "3 of 9 records"))
    assert oom.read(tmp_path).settings == step.attempt.settings
    assert oom.read(tmp_path).rungs[-1].endswith("a step sees as many tokens: 3 of 9 records")


def test_a_shorter_context_keeps_the_checkpoints_and_a_smaller_rank_does_not(tmp_path: Path) -> None:
    context, rank = walk(load("gemma3-12b-t4"))[4:6]
    for name in ("checkpoints", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").touch()
    oom.write(tmp_path, context, context.attempt)
    assert {path.name for path in tmp_path.iterdir()} == {"attempt.json", "checkpoints", "best", "metrics.jsonl"}
    oom.write(tmp_path, rank, rank.attempt)
    assert {path.name for path in tmp_path.iterdir()} == {"attempt.json"}


def test_the_worse_of_records_and_supervised_tokens_counts() -> None:
    assert Lost(1000, 1, 1, 10_000, 50).share == 0.005
    assert Lost(1000, 30, 0, 10_000, 5).share == 0.03
    assert "30 of 1000 records" in str(Lost(1000, 30, 0, 10_000, 5))
