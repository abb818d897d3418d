"""The base model and the adapter on it, by the backend that the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.backends import bitsandbytes, hub, peft, transformers
from trainer.backends import unsloth as unsloth_wall
from trainer.config import Config
from trainer.errors import ConfigError, MachineError
from trainer.training.batches import Example, Packed, Row, packed, padded, row


def nf4(cfg: Config) -> Path:
    """The directory with the base as NF4; made at the first call, only checked at later ones."""
    return bitsandbytes.nf4_state(cfg.model, cfg.paths.cache, size=hub.size(cfg.model, cfg.paths.cache))


def base(cfg: Config, state: Path) -> Any:
    """The text model from its NF4 state, on the device, frozen.

    Raises:
        MachineError: device = "cuda" and no card.
        ModelError: what was loaded is not what the state holds.
    """
    if cfg.model.device == "cuda" and not torch.cuda.is_available():
        raise MachineError('model.device = "cuda", but torch sees no CUDA card: run on a GPU host, or take PRESET=gemma3-270m-cpu')
    if cfg.model.backend == "unsloth":
        return unsloth_wall.load(state, dtype=cfg.model.dtype, max_tokens=cfg.data.max_tokens)
    model = transformers.load(state, dtype=cfg.model.dtype, device=cfg.model.device)
    bitsandbytes.sound_on_cpu(model)
    return model


def with_new_adapter(cfg: Config, model: Any) -> Any:
    """The base with the adapter that training begins with."""
    if cfg.model.backend == "unsloth":
        made = unsloth_wall.attach(model, cfg.adapter, checkpointing=cfg.train.gradient_checkpointing, seed=cfg.train.seed)
        return peft.name_base(made, cfg.model.name, cfg.model.revision)
    return peft.attach(model, cfg.adapter, base_name=cfg.model.name, revision=cfg.model.revision, seed=cfg.train.seed)


def tensors(rows: list[Row]) -> dict[str, Tensor]:
    """A padded batch, [B, T] each."""
    return {name: torch.tensor(values) for name, values in padded(rows).items()}


def packed_tensors(rows: list[Row]) -> dict[str, Any]:
    """A packed batch, [1, T] each, with the boundaries for an attention that reads them (cu_seqlens) and for one that
    derives them (position_ids that restart, and no attention_mask)."""
    found: Packed = packed(rows)
    boundaries = torch.tensor(found.cu_seqlens, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([found.input_ids]),
        "labels": torch.tensor([found.labels]),
        "position_ids": torch.tensor([found.position_ids]),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": found.longest,
        "max_length_k": found.longest,
    }


@torch.no_grad()
def require_boundaries(model: Any, probe: tuple[Example, Example]) -> None:
    """Measure whether the model's attention keeps packed records apart: the second must not see the first.

    Raises:
        ConfigError: it sees it.
    """
    first, second = probe
    device = next(model.parameters()).device
    alone, together = (_hidden(model, packed_tensors([members]), device) for members in (row(second), row(first, second)))
    tail = together[len(first.ids) :]
    error, size = float((tail - alone).abs().max()), float(alone.abs().max())
    if not error <= 0.02 * size:
        raise ConfigError(
            f"pack.enabled = true, but this model's attention lets packed records see each other (hidden states move by {error / size:.0%} "
            "of their size); set pack.enabled = false"
        )


def _hidden(model: Any, batch: dict[str, Any], device: torch.device) -> Tensor:
    """[T, H] final hidden states of one packed line, float32."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items() if name != "labels"}
    hidden: Tensor = model.get_base_model().model(**moved, use_cache=False).last_hidden_state[0]
    return hidden.float()
