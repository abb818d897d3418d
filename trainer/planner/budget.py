"""Bytes of a training step, term by term, from the config and the model's size.

Some bytes stand through the whole step: weights, adapter, gradients, optimizer state. On top of them come moments that exclude
each other, and only the highest counts. Which terms and moments there are depends on who computes the layers: ours.py, stock.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner import ours, stock
from trainer.planner.host import LIBRARIES_BYTES

CONTEXT_BYTES = 228_000_000
"""CUDA context and cuBLAS workspaces: what lies between a T4's 15,095 MiB and the 15.6e9 bytes that a process may use of them."""
UNALLOCATED = ("allocator's slack", "CUDA context")
"""Terms that torch does not count as allocated."""


class Budget(NamedTuple):
    """terms: bytes a term at the highest moment, in reading order; aside: lower moments' own bytes, for the curious."""

    terms: Mapping[str, int]
    moment: str
    aside: Mapping[str, int]

    @property
    def needed_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def allocated_bytes(self) -> int:
        """The forecast of torch's max_memory_allocated."""
        return sum(num for name, num in self.terms.items() if name not in UNALLOCATED)

    @property
    def reserved_bytes(self) -> int:
        """The forecast of torch's max_memory_reserved: with the CUDA context it is what runs out."""
        return self.needed_bytes - self.terms.get("CUDA context", 0)


def budget(cfg: Config, size: Size) -> Budget:
    """What a step of `cfg` needs at its peak, on the card or, with model.device = "cpu", in the machine's memory."""
    if cfg.kernels.layer == "ours":
        standing, moments, slack = ours.standing(cfg, size), ours.moments(cfg, size), ours.slack_bytes
    else:
        standing, moments, slack = stock.standing(cfg, size), stock.moments(cfg, size), stock.slack_bytes
    highest = max(moments, key=lambda name: sum(moments[name].values()))
    terms = {**standing, **moments[highest], **_surroundings(cfg, slack(moments[highest]))}
    aside = {name: sum(parts.values()) for name, parts in moments.items() if name != highest}
    return Budget({name: num for name, num in terms.items() if num}, highest, aside)


def _surroundings(cfg: Config, slack_bytes: int) -> dict[str, int]:
    if cfg.model.device == "cpu":
        return {"Python and its libraries": LIBRARIES_BYTES}
    return {"allocator's slack": slack_bytes, "CUDA context": CONTEXT_BYTES}
