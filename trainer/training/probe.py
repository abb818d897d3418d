"""The longest batch before the first step, so that memory runs out in minute one and not in hour three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer.config import Config
from trainer.kernels import loss
from trainer.training import model as models
from trainer.training.batches import Row
from trainer.training.scaling import Stepper


def longest(
    cfg: Config,
    model: Any,
    rows: Sequence[Row],
    passes: int,
    stepper: Stepper,
    *,
    hidden: loss.Hidden,
    summed: loss.Summed,
    gather: Callable[[], None],
    state_bytes: int,
) -> None:
    """Forward and backward over the longest rows, as a step has them, and nothing that lasts: gradients are dropped and the random
    generators put back, so that what is trained is the same to the last bit.

    passes: a second one meets the gradients of the first. state_bytes: of the optimizer, held meanwhile if it has none yet.
    """
    picked = sorted(rows, key=lambda row: len(row.ids), reverse=True)[: cfg.train.batch_records]
    head = model.get_base_model().get_output_embeddings().weight
    held = torch.empty(0 if stepper.state else state_bytes, dtype=torch.uint8, device=head.device)
    model.train()
    with torch.random.fork_rng(devices=[head.device] if head.device.type == "cuda" else []):
        for _ in range(min(2, passes)):
            batch = models.moved(models.collator(cfg)(picked), head.device)
            (loss.of_batch(batch, hidden, head, summed) * stepper.scale).backward()  # type: ignore[no-untyped-call]
        gather()
    stepper.zero_grad()
    del held
