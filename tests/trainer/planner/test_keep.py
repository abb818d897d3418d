from __future__ import annotations

import pytest

from trainer.gemma3 import SIZES
from trainer.planner import keep
from trainer.planner.keep import Name, kept

SIZE = SIZES["12b"]
TOKENS = 4096
ORDER: list[Name] = ["down", "o", "qkv", "gate_up", "attention"]
ROW = 2 * TOKENS * 3840
"""Bytes of one down output."""


def test_all_layers_of_12b_take_what_was_counted_by_hand() -> None:
    gigabytes = {name: 48 * output.num_bytes / 1e9 for name, output in keep.outputs(SIZE, TOKENS, 64).items()}
    assert gigabytes == pytest.approx({"down": 1.5, "o": 1.5, "qkv": 3.2, "gate_up": 12.1, "attention": 1.62}, rel=0.02)
    assert list(gigabytes) == ORDER


@pytest.mark.parametrize("name", ["270m", "1b", "4b", "12b", "27b", "tiny"])
def test_what_spares_most_flops_a_byte_comes_first_at_every_size(name: str) -> None:
    made = list(keep.outputs(SIZES[name], TOKENS, 64).values())[:-1]
    rates = [sum(2 * TOKENS * out * into for out, into in output.products) / output.num_bytes for output in made]
    assert rates == sorted(rates, reverse=True)


def test_at_4b_queries_are_narrower_than_the_residual_and_o_comes_after_them() -> None:
    assert list(keep.outputs(SIZES["4b"], TOKENS, 64)) == ["down", "qkv", "gate_up", "o", "attention"]


def test_outputs_are_counted_as_they_lie_there() -> None:
    """A row is filled up to 64 tokens, and two buffers have room for the adapter."""
    assert keep.outputs(SIZE, 1000, 64)["down"].num_bytes == 2 * 1024 * 3840
    assert keep.outputs(SIZE, TOKENS, 64)["gate_up"].num_bytes == 2 * TOKENS * (2 * 15360 + 2 * 64)
    assert keep.outputs(SIZE, TOKENS, 64)["attention"].num_bytes == 2 * TOKENS * (4096 + 64) + 4 * TOKENS * 16
    assert keep.outputs(SIZES["4b"], 64, 8)["attention"].num_bytes == 65 * 4096 + 4096, (
        "2 * 64 * (2048 + 8) and 4 * 64 * 8 bytes, whole pages"
    )


def test_without_budgets_nothing_is_kept() -> None:
    assert kept(SIZE, TOKENS, 64, 0, 0) == {}
    assert kept(SIZE, TOKENS, 64, ROW - 1, ROW - 1) == {}


def test_the_last_layers_come_first_and_the_card_before_pinned_memory() -> None:
    assert kept(SIZE, TOKENS, 64, 2 * ROW, ROW) == {47: {"down": "card"}, 46: {"down": "card"}, 45: {"down": "pinned"}}
    assert kept(SIZE, TOKENS, 64, 0, ROW) == {47: {"down": "pinned"}}


def test_one_output_is_kept_of_all_layers_before_the_next_begins() -> None:
    found = kept(SIZE, TOKENS, 64, 49 * ROW, 0)
    assert all(found[layer] == {"down": "card"} for layer in range(47))
    assert found[47] == {"down": "card", "o": "card"}


def test_the_first_that_finds_no_room_ends_it() -> None:
    """After down and o comes qkv, wider than a row: nothing smaller behind it fills the gap."""
    assert kept(SIZE, TOKENS, 64, 97 * ROW, 0) == kept(SIZE, TOKENS, 64, 96 * ROW, 0)
    assert "pinned" not in {where for layer in kept(SIZE, TOKENS, 64, 96 * ROW, ROW).values() for where in layer.values()}


@pytest.mark.parametrize(("card", "pinned"), [(0, 10**9), (10**9, 0), (3 * 10**9, 2 * 10**9), (10**10, 10**11), (10**12, 0)])
def test_no_budget_is_exceeded_and_less_than_one_output_is_left_while_there_is_more(card: int, pinned: int) -> None:
    found = kept(SIZE, TOKENS, 64, card, pinned)
    used = {where: keep.kept_bytes(SIZE, TOKENS, 64, found, where) for where in ("card", "pinned")}
    assert used["card"] <= card
    assert used["pinned"] <= pinned
    widest = max(output.num_bytes for output in keep.outputs(SIZE, TOKENS, 64).values())
    everything = 48 * sum(output.num_bytes for output in keep.outputs(SIZE, TOKENS, 64).values())
    assert used["card"] + used["pinned"] == everything or card - used["card"] < widest


def test_everything_is_kept_of_every_layer_where_budgets_are_endless() -> None:
    found = kept(SIZE, TOKENS, 64, 10**12, 0)
    assert found == {layer: dict.fromkeys(ORDER, "card") for layer in range(48)}
    assert keep.summary(found) == {"card": dict.fromkeys(ORDER, 48), "pinned": {}}


def test_the_largest_layer_is_the_one_that_keeps_most_there() -> None:
    found = kept(SIZE, TOKENS, 64, 47 * ROW, 2 * ROW)
    assert found[47] == {"down": "card", "o": "pinned"}
    assert keep.largest_bytes(SIZE, TOKENS, 64, found, "pinned") == ROW
    assert keep.largest_bytes(SIZE, TOKENS, 64, {}, "pinned") == 0
