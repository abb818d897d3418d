"""What to change when a run does not fit: settings that were tried in arithmetic, so that what is offered does fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner.budget import Budget, budget
from trainer.planner.cards import CARDS

TOKENS_STEP = 256
"""Contexts are offered in multiples of this."""
LOWEST_RANK = 8
"""Below it an adapter is another experiment, not a remedy."""


class Remedy(NamedTuple):
    """setting: what stands after --set; needed_bytes: of the run with it; cost: what one gives up."""

    setting: str
    needed_bytes: int
    cost: str


# Which setting moves a term. Weights, norms and the CUDA context are as they are.
MOVES: Mapping[str, str] = MappingProxyType(
    {
        "attention scores": "data.max_tokens",
        "layer in recompute": "data.max_tokens",
        "logits and loss": "data.max_tokens",
        "checkpoints": "data.max_tokens",
        "the other layers' activations": "train.gradient_checkpointing",
        "DoRA's norms in PEFT": "adapter.dora",
        "adapter": "adapter.rank",
        "gradients": "adapter.rank",
        "optimizer state": "adapter.rank",
    }
)


def largest_movable(found: Budget) -> tuple[str, int]:
    """The largest term that a setting moves, and its bytes."""
    term = max((name for name in found.terms if name in MOVES), key=lambda name: found.terms[name])
    return term, found.terms[term]


def remedies(cfg: Config, size: Size, available_bytes: int) -> list[Remedy]:
    """Single changes that make the run fit, the one that moves the largest term first, the cheapest for quality next."""
    found = [remedy for try_one in _TRIES for remedy in try_one(cfg, size, available_bytes)]
    first = MOVES[largest_movable(budget(cfg, size))[0]]
    return sorted(found, key=lambda remedy: not remedy.setting.startswith(first))


def with_setting(cfg: Config, section: str, **values: Any) -> Config:
    """The config with values of one section replaced."""
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=values)})


def _single(section: str, key: str, value: Any, cost: str) -> Callable[[Config, Size, int], Iterator[Remedy]]:
    """A remedy that is one value of one setting."""

    def try_one(cfg: Config, size: Size, available: int) -> Iterator[Remedy]:
        if getattr(getattr(cfg, section), key) != value:
            needed = budget(with_setting(cfg, section, **{key: value}), size).needed_bytes
            if needed <= available:
                shown = str(value).lower() if isinstance(value, bool) else value
                yield Remedy(f"{section}.{key}={shown}", needed, cost)

    return try_one


def _fewer_tokens(cfg: Config, size: Size, available: int) -> Iterator[Remedy]:
    """The longest context that fits."""
    top = (cfg.data.max_tokens - 1) // TOKENS_STEP
    for max_tokens in range(top * TOKENS_STEP, 0, -TOKENS_STEP):
        needed = budget(with_setting(cfg, "data", max_tokens=max_tokens), size).needed_bytes
        if needed <= available:
            yield Remedy(f"data.max_tokens={max_tokens}", needed, "longer conversations lose their oldest turns")
            return


def _lower_rank(cfg: Config, size: Size, available: int) -> Iterator[Remedy]:
    rank = cfg.adapter.rank // 2
    while rank >= LOWEST_RANK:
        needed = budget(with_setting(cfg, "adapter", rank=rank), size).needed_bytes
        if needed <= available:
            yield Remedy(f"adapter.rank={rank}", needed, "a smaller adapter learns less")
            return
        rank //= 2


def _larger_card(cfg: Config, size: Size, available: int) -> Iterator[Remedy]:
    """The smallest named card that holds the run as it is; nothing where the memory was given as a number, or is this machine's."""
    needed = budget(cfg, size).needed_bytes
    if cfg.model.device == "cuda" and not cfg.plan.vram_gb:
        fitting = [card for card in CARDS.values() if available < card.memory_bytes >= needed]
        yield from (Remedy(f"plan.card={card.name}", needed, "another card") for card in fitting[:1])


_TRIES: tuple[Callable[[Config, Size, int], Iterator[Remedy]], ...] = (
    _single("train", "gradient_checkpointing", True, "a third more arithmetic"),
    _single("model", "double_quant", True, "nothing that was ever measured"),
    _single("train", "batch_records", 1, "some speed"),
    _single("train", "optimizer", "adamw8bit", "nothing that was ever measured"),
    _fewer_tokens,
    _single("adapter", "dora", False, "DoRA's gain in quality"),
    _lower_rank,
    _larger_card,
)
