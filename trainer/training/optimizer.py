"""AdamW over an adapter, in two groups: LoRA's matrices, and DoRA's magnitudes.

A magnitude never decays: it stands for the norm of a pre-trained row, and zero is no place to pull it to. Its state stays in
32 bit in the 8-bit optimizer too, as it is 1 % of the adapter and steers all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from trainer.config import Train

MAGNITUDE = "lora_magnitude_vector"
"""Part of the name of every magnitude in PEFT."""


def groups(named: Iterable[tuple[str, Parameter]], train: Train) -> list[dict[str, Any]]:
    """The parameters that train, split into those that decay and the magnitudes."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if MAGNITUDE not in name]
    magnitudes = [parameter for name, parameter in trained if MAGNITUDE in name]
    found = [
        {"params": matrices, "weight_decay": train.weight_decay, "lr": train.learning_rate},
        {"params": magnitudes, "weight_decay": 0.0, "lr": train.learning_rate, "optim_bits": 32},
    ]
    return [group for group in found if group["params"]]


def build(named: Iterable[tuple[str, Parameter]], train: Train) -> torch.optim.Optimizer:
    if train.optimizer == "adamw8bit":
        from trainer.backends.bitsandbytes import adamw8bit

        eight_bit: torch.optim.Optimizer = adamw8bit(groups(named, train))
        return eight_bit
    return torch.optim.AdamW(groups(named, train))
