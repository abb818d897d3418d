"""The longest context and the largest rank with which a run fits, everything else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner import cards, ours
from trainer.planner.budget import budget
from trainer.planner.remedy import TOKENS_STEP, with_setting

RANK_STEP = 8
MOST_RANK = 1024
"""Larger adapters are full fine-tuning in disguise."""


class Most(NamedTuple):
    """0 where nothing fits. roomy_tokens: the longest context with everything that gives up speed for room (ROOMY)."""

    tokens: int
    rank: int
    roomy_tokens: int


ROOMY = {"keep_bytes": 0, "keep_pinned_bytes": 0, "span_layers": 2, "pin_gradients": True}


def most(cfg: Config, size: Size, available_bytes: int) -> Most:
    """Multiples of TOKENS_STEP and RANK_STEP; what would pin more than the machine has does not fit either."""
    roomy = with_setting(cfg, "kernels", **ROOMY) if cfg.kernels.layer == "ours" else cfg
    return Most(longest(cfg, size, available_bytes), largest_rank(cfg, size, available_bytes), longest(roomy, size, available_bytes))


def longest(cfg: Config, size: Size, available_bytes: int) -> int:
    def fits(num: int) -> bool:
        return _fits(with_setting(cfg, "data", max_tokens=num * TOKENS_STEP), size, available_bytes)

    return TOKENS_STEP * _last(fits, size.max_positions // TOKENS_STEP)


def largest_rank(cfg: Config, size: Size, available_bytes: int) -> int:
    def fits(num: int) -> bool:
        return _fits(with_setting(cfg, "adapter", rank=num * RANK_STEP), size, available_bytes)

    return RANK_STEP * _last(fits, MOST_RANK // RANK_STEP)


def _fits(cfg: Config, size: Size, available_bytes: int) -> bool:
    limits = cards.pinned_limits(cfg.plan)
    pins = limits is not None and ours.pinned_bytes(cfg, size) > limits[1]
    return not pins and budget(cfg, size).needed_bytes <= available_bytes


def _last(fits: Callable[[int], bool], top: int) -> int:
    """The largest number of 1..top that fits, 0 where none does, by halves."""
    low, high = 0, top + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
