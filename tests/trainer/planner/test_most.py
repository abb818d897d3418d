from __future__ import annotations

import pytest

from trainer.config import load
from trainer.gemma3 import SIZES
from trainer.planner import remedy
from trainer.planner.budget import budget
from trainer.planner.cards import CARDS
from trainer.planner.most import RANK_STEP, most

SIZE, T4 = SIZES["12b"], CARDS["T4"].memory_bytes


@pytest.mark.parametrize("overrides", [[], ["kernels.layer=stock"], ["kernels.keep_bytes=0", "kernels.keep_pinned_bytes=0"]])
def test_what_is_called_the_most_fits_and_a_step_more_does_not(overrides: list[str]) -> None:
    cfg = load("gemma3-12b-t4", overrides)
    found = most(cfg, SIZE, T4)

    def needed(tokens: int = cfg.data.max_tokens, rank: int = cfg.adapter.rank) -> int:
        changed = remedy.with_setting(remedy.with_setting(cfg, "data", max_tokens=tokens), "adapter", rank=rank)
        return budget(changed, SIZE).needed_bytes

    assert needed(tokens=found.tokens) <= T4 < needed(tokens=found.tokens + remedy.TOKENS_STEP)
    if found.rank:
        assert needed(rank=found.rank) <= T4
    assert needed(rank=found.rank + RANK_STEP) > T4


def test_the_preset_could_go_to_16384_tokens_and_to_24576_with_all_that_gives_up_speed_for_room() -> None:
    found = most(load("gemma3-12b-t4"), SIZE, T4)
    assert found.tokens >= 16_384
    assert found.roomy_tokens >= 24_576
    assert found.rank >= 64


def test_pinned_memory_ends_a_context_too() -> None:
    """A T4's machine has 12.7 GB; on a larger one the card decides."""
    cfg = load("gemma3-12b-t4", ["kernels.keep_bytes=0", "kernels.keep_pinned_bytes=8_500_000_000"])
    assert most(cfg, SIZE, T4).tokens < most(remedy.with_setting(cfg, "plan", vram_gb=T4 / 1e9), SIZE, T4).tokens


def test_where_nothing_fits_the_most_is_nothing() -> None:
    assert most(load("gemma3-12b-t4"), SIZE, 4_000_000_000) == (0, 0, 0)
