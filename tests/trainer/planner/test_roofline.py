from __future__ import annotations

import pytest

from trainer.config import Config, load
from trainer.gemma3 import SIZES
from trainer.planner import keep, roofline
from trainer.planner.cards import CARDS

SIZE = SIZES["12b"]
T4 = CARDS["T4"]


def with_ours(*overrides: str) -> Config:
    nothing = ["kernels.layer=ours", "kernels.keep_bytes=0", "kernels.keep_pinned_bytes=0", "export.num_ctx=65536"]
    return load("gemma3-12b-t4", [*nothing, *overrides])


def test_generation_takes_two_models_where_answers_are_compared_and_one_for_references() -> None:
    one = roofline.generation_s(load("gemma3-12b-t4"), SIZE, T4)
    two = roofline.generation_s(load("gemma3-12b-t4", ["evaluate.exact_match=true", "evaluate.max_records=32"]), SIZE, T4)
    assert two == pytest.approx(2 * one)
    token_s = (7.567e9 + 4 * 10_758_389_760) / 300e9
    assert one == pytest.approx(8 * 256 * token_s, rel=0.001)


def test_a_step_of_4096_tokens_counts_309_tflop_and_13_seconds_on_a_t4() -> None:
    """The counts by part were made by hand for the same step."""
    parts = roofline.step_flops(with_ours(), SIZE)
    by_hand = {"linears": 3 * 88.1e12, "head": 16.5e12, "LoRA": 11e12, "attention": 15.7e12, "norms": 1.4e12, "spans": 0.0, "kept": 0.0}
    assert parts == pytest.approx(by_hand, rel=0.03)
    assert sum(parts.values()) == pytest.approx(309e12, rel=0.002)
    assert roofline.step_s(with_ours(), SIZE, T4) == pytest.approx(13, abs=0.5)


def test_kept_outputs_spare_what_their_products_cost() -> None:
    """down's output of all 48 layers is 1.5 GB and spares 23.2 TFLOP; q, k, v 3.2 GB for 12.4; gate and up 12.1 GB for 46.4."""
    sizes = [48 * output.num_bytes for output in keep.outputs(SIZE, 4096, 64).values()]
    for num, tflop in ((1, 23.2), (2, 29.4), (3, 41.8), (4, 88.1)):
        cfg = with_ours(f"kernels.keep_bytes={sum(sizes[:num])}")
        assert roofline.kept_flops(cfg, SIZE) == pytest.approx(tflop * 1e12, rel=0.005)
    cfg = with_ours(f"kernels.keep_pinned_bytes={sum(sizes)}")
    assert roofline.kept_flops(cfg, SIZE) == pytest.approx(91.6e12, rel=0.005)


def test_two_layers_a_span_cost_a_sixth_of_the_linears_and_kept_outputs_count_twice_in_one_of_them() -> None:
    parts = roofline.step_flops(with_ours("kernels.span_layers=2"), SIZE)
    assert parts["spans"] == pytest.approx(parts["linears"] / 6, rel=0.05)
    down = 48 * keep.outputs(SIZE, 4096, 64)["down"].num_bytes
    budget = f"kernels.keep_bytes={down}"
    once = roofline.kept_flops(with_ours(budget), SIZE)
    assert roofline.kept_flops(with_ours(budget, "kernels.span_layers=2"), SIZE) == pytest.approx(1.5 * once)


def test_keeping_makes_a_step_shorter() -> None:
    """Down's and o's outputs, 3.0 GB: 29 TFLOP of 309 at 24 TFLOP/s."""
    nothing, something = (roofline.step_s(with_ours(f"kernels.keep_bytes={num}"), SIZE, T4) for num in (0, 3_020_000_000))
    assert nothing and something
    assert nothing - something == pytest.approx(29.4 / 24, rel=0.005)


def test_a_window_longer_than_the_document_is_full_attention() -> None:
    assert roofline.attention_flops(SIZE, 512, 0) == roofline.attention_flops(SIZE, 512, 5)
    assert roofline.attention_flops(SIZE, 4096, 0) < roofline.attention_flops(SIZE, 4096, 5)


def test_nothing_is_said_of_cards_that_nobody_measured_nor_of_the_stock_layer() -> None:
    assert roofline.step_s(with_ours(), SIZE, CARDS["H100"]) is None
    assert roofline.step_s(load("gemma3-12b-t4", ["kernels.layer=stock"]), SIZE, T4) is None
