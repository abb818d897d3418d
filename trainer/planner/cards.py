"""What a card has, as CUDA itself counts it."""

from __future__ import annotations

from typing import NamedTuple

from trainer.config import Plan

MIB = 2**20

HOST_BYTES = 12_700_000_000
"""Memory of the machine that Colab gives with a T4."""
PINNED_BYTES = 6_500_000_000
"""Half of it: what may be pinned and leaves the process, the file cache and the system room."""


class Card(NamedTuple):
    """memory_bytes: torch's total_memory, less than the sticker says; bandwidth: bytes/s of the data sheet; flops_per_s: what large
    float16 products are known to sustain, where that is known."""

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: float | None = None


# The T4's memory is measured (15,095 MiB); the others' are what CUDA's out-of-memory messages call the card's total capacity.
# A T4's tensor cores do 65 TFLOP/s by the data sheet; under its 70 W cuBLAS was seen at 24 (4096^3, NVIDIA's forum, topic 264462).
CARDS = {
    card.name: card
    for card in (
        Card("T4", 15_095 * MIB, 300e9, 24e12),
        Card("L4", 22_690 * MIB, 300e9),
        Card("A10", 22_580 * MIB, 600e9),
        Card("A100-40", 40_500 * MIB, 1555e9),
        Card("H100", 81_000 * MIB, 3350e9),
    )
}


def card(plan: Plan) -> Card:
    """The card of a plan; plan.vram_gb (1e9 bytes) replaces the memory, and the name then only lends its bandwidth."""
    named = CARDS[plan.card]
    if not plan.vram_gb:
        return named
    return named._replace(name=f"card with {plan.vram_gb:g} GB", memory_bytes=round(plan.vram_gb * 1e9))


def pinned_limits(plan: Plan) -> tuple[int, int] | None:
    """Bytes of pinned memory that are worth a warning, and that no machine of the plan's kind has; None where nobody knows the machine."""
    return (PINNED_BYTES, HOST_BYTES) if plan.card == "T4" and not plan.vram_gb else None
