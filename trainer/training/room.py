"""The plan's check once more before a training, with the memory that the card really has free, and with the names of those who hold the rest."""

from __future__ import annotations

import os

from trainer import cards, holders
from trainer.backends import hub
from trainer.config import Config
from trainer.planner import refusal


def require(cfg: Config) -> None:
    """Nothing is asked on a CPU, nor where neither driver nor nvidia-smi can tell.

    Raises:
        DoesNotFitError: the forecast is more than what is free.
    """
    card = cards.first() if cfg.model.device == "cuda" else None
    free_bytes = cards.free_bytes(card) if card else None
    if card is None or free_bytes is None:
        return
    others = [str(one) for one in holders.on_card(card.uuid) if one.pid != os.getpid()]
    size = hub.size(cfg.model, cfg.paths.cache)
    refusal.require(cfg, size, where=card.name, free_bytes=min(free_bytes, card.total_bytes), total_bytes=card.total_bytes, holders=others)
