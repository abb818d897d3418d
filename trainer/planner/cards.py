"""What a card has, as CUDA itself counts it."""

from __future__ import annotations

from typing import NamedTuple

from trainer.config import Plan

MIB = 2**20


class Card(NamedTuple):
    """memory_bytes: torch's total_memory, less than the sticker says; bandwidth: bytes/s of the data sheet."""

    name: str
    memory_bytes: int
    bytes_per_s: float


# The T4's memory is measured (15,095 MiB); the others' are what CUDA's out-of-memory messages call the card's total capacity.
CARDS = {
    card.name: card
    for card in (
        Card("T4", 15_095 * MIB, 300e9),
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
