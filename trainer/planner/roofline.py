"""Seconds from bytes moved. Thin: only generation in evaluate, which surprises people most; steps follow with our own kernels."""

from __future__ import annotations

import math

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner.budget import weights
from trainer.planner.cards import Card


def generation_s(cfg: Config, size: Size, card: Card) -> float:
    """Most time that evaluate generates, s: every answer as long as evaluate.max_new_tokens, and nothing but memory traffic.

    A token of a batch reads all weights; with more than one record bitsandbytes first writes each linear in 16 bit and
    reads it again, 4 bytes a weight. Attention and launches are left out: the true time is longer, answers mostly shorter.
    """
    records, models = (cfg.evaluate.max_records, 2) if cfg.evaluate.exact_match else (cfg.evaluate.reference_records, 1)
    batches = math.ceil(records / cfg.evaluate.batch_records)
    dequantised = 4 * size.num_linear_parameters if cfg.evaluate.batch_records > 1 else 0
    token_s = (sum(weights(cfg, size).values()) + dequantised) / card.bytes_per_s
    return models * batches * cfg.evaluate.max_new_tokens * token_s
