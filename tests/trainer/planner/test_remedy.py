from __future__ import annotations

import pytest

from trainer.config import load
from trainer.gemma3 import SIZES
from trainer.planner import remedy, roofline
from trainer.planner.budget import budget
from trainer.planner.cards import CARDS, card

SIZE = SIZES["12b"]


def test_every_setting_that_is_offered_makes_the_run_fit() -> None:
    available = CARDS["T4"].memory_bytes
    ways = remedy.remedies(load("gemma3-12b-t4"), SIZE, available)
    assert ways
    for way in ways:
        cfg = load("gemma3-12b-t4", [way.setting])
        assert budget(cfg, SIZE).needed_bytes == way.needed_bytes
        assert way.needed_bytes <= card(cfg.plan).memory_bytes


def test_the_setting_of_the_largest_movable_term_comes_first() -> None:
    cfg = load("gemma3-12b-t4")
    term, _ = remedy.largest_movable(budget(cfg, SIZE))
    assert term == "attention scores"
    assert remedy.remedies(cfg, SIZE, CARDS["T4"].memory_bytes)[0].setting.startswith("data.max_tokens=")


def test_the_context_offered_is_the_longest_that_fits() -> None:
    available = CARDS["T4"].memory_bytes
    cfg = load("gemma3-12b-t4")
    longest = int(remedy.remedies(cfg, SIZE, available)[0].setting.partition("=")[2])
    longer = remedy.with_setting(cfg, "data", max_tokens=longest + remedy.TOKENS_STEP)
    assert budget(longer, SIZE).needed_bytes > available


def test_nothing_is_offered_where_nothing_helps() -> None:
    assert remedy.remedies(load("gemma3-12b-t4", ["plan.vram_gb=4"]), SIZE, 4_000_000_000) == []


def test_a_machine_without_a_card_is_not_offered_one() -> None:
    ways = remedy.remedies(load("gemma3-270m-cpu", ["train.batch_records=1"]), SIZES["270m"], 10**9)
    assert not [way for way in ways if way.setting.startswith("plan.card")]


def test_generation_takes_two_models_where_answers_are_compared_and_one_for_references() -> None:
    t4 = CARDS["T4"]
    one = roofline.generation_s(load("gemma3-12b-t4"), SIZE, t4)
    two = roofline.generation_s(load("gemma3-12b-t4", ["evaluate.exact_match=true", "evaluate.max_records=32"]), SIZE, t4)
    assert two == pytest.approx(2 * one)
    token_s = (7.567e9 + 4 * 10_758_389_760) / 300e9
    assert one == pytest.approx(8 * 256 * token_s, rel=0.001)
