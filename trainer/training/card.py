"""Which NVIDIA card one process uses. Decided before torch is imported, since CUDA reads its environment once."""

from __future__ import annotations

QUERY = ("nvidia-smi", "--query-gpu=index,memory.free,name", "--format=csv,noheader,nounits")
"""The command whose output choose_card reads: one line a card, free memory in MiB."""


def choose_card(nvidia_smi_output: str) -> int:
    """Index of the card with the most free memory; the first of equals.

    Raises:
        ValueError: no line describes a card.
    """
    cards = [_card(line) for line in nvidia_smi_output.splitlines() if line.count(",") >= 2]
    if not cards:
        raise ValueError(f"nvidia-smi names no card: {nvidia_smi_output.strip()[:200]!r}")
    index, _ = max(cards, key=lambda card: (card[1], -card[0]))
    return index


def _card(line: str) -> tuple[int, int]:
    index, free, *_ = (part.strip() for part in line.split(","))
    return int(index), int(free) if free.isdigit() else 0  # "[N/A]" on cards that share the host's memory
