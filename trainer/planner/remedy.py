"""What to change when a run does not fit: settings that were tried in arithmetic, so that what is offered does fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner import keep, ours
from trainer.planner.budget import Budget, budget
from trainer.planner.cards import CARDS
from trainer.planner.standing import tokens

TOKENS_STEP = 256
"""Contexts are offered in multiples of this."""
LOWEST_RANK = 8
"""Below it an adapter is another experiment, not a remedy."""
KEEP_STEP = 100_000_000
"""Budgets for kept tensors are offered in multiples of this, bytes."""
KEEP_RESERVE = 300_000_000
"""What a larger budget for kept tensors leaves free, bytes: speed is not worth a run that dies at its longest row."""


class Remedy(NamedTuple):
    """setting: what stands after --set; needed_bytes: of the run with it; cost: what one gives up."""

    setting: str
    needed_bytes: int
    cost: str


class Movable(NamedTuple):
    """A term that a setting moves."""

    term: str
    num_bytes: int
    setting: str


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
        "gradients, back for the step": "adapter.rank",
        "optimizer state": "adapter.rank",
        "kept tensors": "kernels.keep_bytes",
        "kept tensors, back": "kernels.keep_pinned_bytes",
        "layer inputs": "kernels.offload",
        "layer input, on its way": "data.max_tokens",
        "residuals": "data.max_tokens",
        "attention's half": "data.max_tokens",
        "MLP input": "data.max_tokens",
        "MLP tile": "kernels.mlp_tile_tokens",
        "attention tensors": "data.max_tokens",
    }
)
Needed = Callable[[Config], int]
"""Bytes of a config, in the memory that is short."""
Try = Callable[[Config, Needed, int], Iterator[Remedy]]


def largest_movable(cfg: Config, found: Budget) -> Movable:
    """The largest term that a setting moves. In our layer scores come in blocks of a fixed size, and gradients can leave the card."""
    moves = dict(MOVES)
    if cfg.kernels.layer == "ours":
        if cfg.kernels.attention == "ours":
            del moves["attention scores"]
        if cfg.model.device == "cuda" and not cfg.kernels.pin_gradients:
            moves["gradients"] = "kernels.pin_gradients"
    term = max((name for name in found.terms if name in moves), key=lambda name: found.terms[name])
    return Movable(term, found.terms[term], moves[term])


def remedies(cfg: Config, size: Size, available_bytes: int) -> list[Remedy]:
    """Single changes that make the run fit: kernels first, as they cost no quality, then what moves the largest term, then the rest."""

    def needed(changed: Config) -> int:
        return budget(changed, size).needed_bytes

    found = [remedy for try_one in _TRIES for remedy in try_one(cfg, needed, available_bytes)]
    first = largest_movable(cfg, budget(cfg, size)).setting
    return sorted(found, key=lambda remedy: (not remedy.setting.startswith("kernels."), not remedy.setting.startswith(first)))


def pinned_remedies(cfg: Config, size: Size, most_bytes: int, available_bytes: int) -> list[Remedy]:
    """Single changes that bring the pinned memory under most_bytes while the run fits the card's available_bytes."""

    def needed(changed: Config) -> int:
        fits = budget(changed, size).needed_bytes <= available_bytes
        return ours.pinned_bytes(changed, size) if fits else sys.maxsize

    return [remedy for try_one in _PINNED_TRIES for remedy in try_one(cfg, needed, most_bytes)]


def roomiest_keep(cfg: Config, size: Size, available_bytes: int) -> int:
    """The largest kernels.keep_bytes, in steps of KEEP_STEP, with which the run fits and leaves KEEP_RESERVE; 0 in the stock layer."""
    if cfg.kernels.layer == "stock":
        return 0
    everything = size.num_layers * sum(output.num_bytes for output in keep.outputs(size, tokens(cfg), cfg.adapter.rank).values())
    most_bytes = available_bytes - KEEP_RESERVE

    def fits(keep_bytes: int) -> bool:
        return budget(with_setting(cfg, "kernels", keep_bytes=keep_bytes), size).needed_bytes <= most_bytes

    room = most_bytes - budget(with_setting(cfg, "kernels", keep_bytes=0), size).needed_bytes
    top = min(math.ceil(everything / KEEP_STEP), room // KEEP_STEP + 1)
    return next((num for num in range(top * KEEP_STEP, 0, -KEEP_STEP) if fits(num)), 0)


def with_setting(cfg: Config, section: str, **values: Any) -> Config:
    """The config with values of one section replaced."""
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=values)})


def _single(section: str, key: str, value: Any, cost: str) -> Try:
    """A remedy that is one value of one setting."""

    def try_one(cfg: Config, needed: Needed, available: int) -> Iterator[Remedy]:
        if getattr(getattr(cfg, section), key) != value:
            num_bytes = needed(with_setting(cfg, section, **{key: value}))
            if num_bytes <= available:
                shown = str(value).lower() if isinstance(value, bool) else value
                yield Remedy(f"{section}.{key}={shown}", num_bytes, cost)

    return try_one


def _fewer(section: str, key: str, step: int, lowest: int, cost: str) -> Try:
    """The largest smaller value of a setting that fits, in multiples of `step`."""

    def try_one(cfg: Config, needed: Needed, available: int) -> Iterator[Remedy]:
        top = (getattr(getattr(cfg, section), key) - 1) // step * step
        for value in range(top, lowest - 1, -step):
            num_bytes = needed(with_setting(cfg, section, **{key: value}))
            if num_bytes <= available:
                yield Remedy(f"{section}.{key}={value}", num_bytes, cost)
                return

    return try_one


def _our_layer(cfg: Config, needed: Needed, available: int) -> Iterator[Remedy]:
    """Our layer goes into the model that unsloth loads."""
    if cfg.model.backend == "unsloth":
        yield from _single("kernels", "layer", "ours", "nothing: the same function")(cfg, needed, available)


def _lower_rank(cfg: Config, needed: Needed, available: int) -> Iterator[Remedy]:
    rank = cfg.adapter.rank // 2
    while rank >= LOWEST_RANK:
        num_bytes = needed(with_setting(cfg, "adapter", rank=rank))
        if num_bytes <= available:
            yield Remedy(f"adapter.rank={rank}", num_bytes, "a smaller adapter learns less")
            return
        rank //= 2


def _larger_card(cfg: Config, needed: Needed, available: int) -> Iterator[Remedy]:
    """The smallest named card that holds the run as it is; nothing where the memory was given as a number, or is this machine's."""
    num_bytes = needed(cfg)
    if cfg.model.device == "cuda" and not cfg.plan.vram_gb:
        fitting = [card for card in CARDS.values() if available < card.memory_bytes >= num_bytes]
        yield from (Remedy(f"plan.card={card.name}", num_bytes, "another card") for card in fitting[:1])


_fewer_tokens = _fewer("data", "max_tokens", TOKENS_STEP, TOKENS_STEP, "longer conversations lose their oldest turns")
_two_layers = _single("kernels", "span_layers", 2, "a sixth more arithmetic")
_less_pinned = _fewer("kernels", "keep_pinned_bytes", KEEP_STEP, 0, "some speed: more is computed again")

_TRIES: tuple[Try, ...] = (
    _our_layer,
    _fewer("kernels", "keep_bytes", KEEP_STEP, 0, "some speed: more is computed again"),
    _less_pinned,
    _two_layers,
    _single("kernels", "pin_gradients", True, "some speed, and pinned memory"),
    _single("kernels", "mlp_tile_tokens", 1024, "some speed: each tile dequantises again"),
    _single("train", "gradient_checkpointing", True, "a third more arithmetic"),
    _single("model", "double_quant", True, "nothing that was ever measured"),
    _single("train", "batch_records", 1, "some speed"),
    _single("train", "optimizer", "adamw8bit", "nothing that was ever measured"),
    _fewer_tokens,
    _single("adapter", "dora", False, "DoRA's gain in quality"),
    _lower_rank,
    _larger_card,
)
_PINNED_TRIES: tuple[Try, ...] = (
    _less_pinned,
    _two_layers,
    _single("kernels", "pin_gradients", False, "a gigabyte of the card at rank 64"),
    _fewer_tokens,
)
