"""The base model and the adapter on it, by the backend that the config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.backends import bitsandbytes, hub, peft, transformers
from trainer.backends import unsloth as unsloth_wall
from trainer.config import Config
from trainer.errors import ConfigError, MachineError
from trainer.kernels import loss, stack
from trainer.planner import ours, standing
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


def installed(cfg: Config, model: Any) -> stack.Stack:
    """Our decoder layers in a model with a new adapter."""
    size = hub.size(cfg.model, cfg.paths.cache)
    settings = stack.Settings(
        kernels=cfg.kernels,
        dtype=getattr(torch, cfg.model.dtype),
        scale=cfg.adapter.scale,
        max_tokens=standing.tokens(cfg),
        kept={layer: {str(name): str(where) for name, where in names.items()} for layer, names in ours.kept(cfg, size).items()},
    )
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # partial sums of a product stay float32
    return stack.install(model, size, settings)


def collator(cfg: Config) -> Callable[[list[Row]], dict[str, Any]]:
    """How rows become a batch: our decoder layer reads packed lines only, one record a row or several."""
    return packed_tensors if cfg.pack.enabled or cfg.kernels.layer == "ours" else tensors


def hidden_states(model: Any) -> loss.Hidden:
    """What a model computes up to its head by its own forward pass; Gemma 3 caps no logits."""
    inner = model.get_base_model().model

    def hidden(inputs: Mapping[str, Any]) -> Tensor:
        found: Tensor = inner(**inputs, use_cache=False).last_hidden_state
        return found

    return hidden


def tensors(rows: list[Row]) -> dict[str, Any]:
    """A padded batch, [B, T] each, and what is beside it (_beside)."""
    made = {name: torch.tensor(values) for name, values in padded(rows).items()}
    return made | _beside(made["labels"], rows)


def _beside(labels: Tensor, rows: list[Row]) -> dict[str, Any]:
    """What would cost a wait for the card to learn there: which rows bear loss, and how many tokens are no padding."""
    return {"supervised": loss.supervised_rows(labels), "num_tokens": sum(len(one.ids) for one in rows)}


def packed_tensors(rows: list[Row]) -> dict[str, Any]:
    """A packed batch, [1, T] each, with the boundaries for an attention that reads them (cu_seqlens) and for one that
    derives them (position_ids that restart, and no attention_mask)."""
    found: Packed = packed(rows)
    boundaries = torch.tensor(found.cu_seqlens, dtype=torch.int32)
    labels = torch.tensor([found.labels])
    return {
        "input_ids": torch.tensor([found.input_ids]),
        "labels": labels,
        "position_ids": torch.tensor([found.position_ids]),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": found.longest,
        "max_length_k": found.longest,
        **_beside(labels, rows),
    }


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@torch.no_grad()
def require_boundaries(model: Any, probe: tuple[Example, Example], hidden: loss.Hidden | None = None) -> None:
    """Measure whether the model's attention keeps packed records apart: the second must not see the first.

    Raises:
        ConfigError: it sees it.
    """
    first, second = probe
    compute, device = hidden or hidden_states(model), next(model.parameters()).device
    batches = [packed_tensors([members]) for members in (row(second), row(first, second))]
    alone, together = (compute(loss.inputs(moved(batch, device)))[0].float() for batch in batches)
    tail = together[len(first.ids) :]
    error, size = float((tail - alone).abs().max()), float(alone.abs().max())
    if not error <= 0.02 * size:
        raise ConfigError(
            f"pack.enabled = true, but this model's attention lets packed records see each other (hidden states move by {error / size:.0%} "
            "of their size); set pack.enabled = false"
        )
