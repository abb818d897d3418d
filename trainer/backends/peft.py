"""Wall around PEFT: make, save and load the adapter, and run DoRA with row norms that are kept.

PEFT computes y = g * (W x + s B A x) with g = m / n, n_o = |W_o + s (B A)_o|, and builds n anew in every forward pass, from
eye(d_in), the dense B A and the dequantised W, and once more for a checkpoint's recomputation. But n only changes with the
weights: once an optimizer step in training, never in evaluation. So another object with the same forward stands at PEFT's
seam, `layer.lora_variant[adapter]`: our op trinity::dora with kept norms (trainer/kernels/dora.py) in place of all that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.backends import bitsandbytes
from trainer.config import Adapter
from trainer.errors import ConfigError, ModelError
from trainer.kernels.dora import dora as dora_op

NAME = "default"
"""What PEFT calls the one adapter of a model."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SEAM = "dora: trinity::dora at PEFT's seam"
"""What runs where norms are kept, for the facts."""
_ROWS = 1024
"""Rows of W that are dequantised at a time: at most 63 MB of float32 at 15,360 columns."""


def attach(model: Any, adapter: Adapter, *, base_name: str, revision: str, seed: int) -> Any:
    """A PeftModel with a new adapter on every targeted linear; B is zero, so it computes what the base computes."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=_whole(adapter.alpha),
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        use_rslora=adapter.rslora,
        target_modules=list(adapter.targets),
        task_type="CAUSAL_LM",
        bias="none",
    )
    return name_base(get_peft_model(model, settings), base_name, revision)


def name_base(model: Any, base_name: str, revision: str) -> Any:
    """Say in adapter_config.json which model the adapter belongs to: its name, not a cache directory."""
    settings = model.peft_config[NAME]
    settings.base_model_name_or_path, settings.revision = base_name, revision or None
    return model


def save(model: Any, directory: Path) -> None:
    """Exactly PEFT's two files. Equal adapters give equal bytes."""
    # "auto" would ask the hub whether the vocabulary was resized.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # PEFT keeps a set
    settings["auto_mapping"] = None  # names the class that unsloth compiled; no one else has it
    (directory / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(model: Any, directory: Path, *, base_name: str) -> Any:
    """The base with a trained adapter, for inference.

    Raises:
        ModelError: the adapter was made for another base.
    """
    from peft import PeftModel

    named = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if named != base_name:
        raise ModelError(
            f"{directory / CONFIG}: the adapter belongs to {named!r}, not to {base_name!r}; set model.name to that base, or train again"
        )
    return PeftModel.from_pretrained(model, str(directory))


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    """Within the block the model computes what it did before it had an adapter."""
    with model.disable_adapter():
        yield


def layers(model: Any) -> list[Any]:
    """PEFT's layers, in the model's order."""
    return [module for module in model.modules() if hasattr(module, "lora_variant") and NAME in module.lora_A]


class KeptNorms:
    """DoRA's forward as one op, trinity::dora, with row norms that only refresh() renews; stands where PEFT's DoraLinearVariant stood.

    PEFT treats n as a constant in backward too (arXiv 2402.09353, section 4.3), so gradients are the same.
    """

    def __init__(self, layer: Any, squares_O: Tensor | None = None) -> None:
        self._squares_O = squared_norms(layer) if squares_O is None else squares_O
        self.norms_O = norms(layer, self._squares_O)

    def beside(self, layer: Any) -> KeptNorms:
        """Another one, with the norms of now; these stay as they are."""
        return KeptNorms(layer, self._squares_O)

    def refresh(self, layer: Any) -> None:
        """To be called after A or B changed."""
        self.norms_O.copy_(norms(layer, self._squares_O))

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """result: W x, without bias. x comes in A's dtype."""
        a_RI, b_OR = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        m_O, scale = module.lora_magnitude_vector[active_adapter].weight, float(module.scaling[active_adapter])
        found: Tensor = dora_op(result, x, a_RI, b_OR, m_O, self.norms_O, scale)
        return found


def keep_norms(model: Any, *, new: bool) -> bool:
    """Run every DoRA linear through trinity::dora from now on, with norms that stay until refresh_norms(); False without DoRA.

    new: a new adapter's m is set to n, by the routine that will compute n ever after: g is then 1 to the bit. Any other m stays.

    Raises:
        ConfigError: the adapter has dropout; then W, too, sees the dropped x, which needs a second product with W.
    """
    dora = _dora(model)
    if any(not isinstance(layer.lora_dropout[NAME], torch.nn.Identity) for layer in dora):
        raise ConfigError(
            f'adapter.dropout = {dora[0].lora_dropout[NAME].p}: kernels.dora = "ours" is made for 0; '
            "set adapter.dropout=0 or kernels.dora=stock"
        )
    for layer in dora:
        layer.lora_variant[NAME] = kept = KeptNorms(layer)
        if new:
            layer.lora_magnitude_vector[NAME].weight.data.copy_(kept.norms_O)
    return bool(dora)


def refresh_norms(model: Any) -> None:
    """To be called after every optimizer step of a model whose norms are kept."""
    for layer in _dora(model):
        if isinstance(layer.lora_variant[NAME], KeptNorms):
            layer.lora_variant[NAME].refresh(layer)


@contextmanager
def frozen_norms(model: Any) -> Iterator[None]:
    """Within the block no weight may change, and DoRA costs next to nothing. Without DoRA nothing happens."""
    assert not model.training, "gradients change weights, and norms with them"
    dora = _dora(model)
    before = [layer.lora_variant[NAME] for layer in dora]
    for layer, variant in zip(dora, before, strict=True):
        layer.lora_variant[NAME] = variant.beside(layer) if isinstance(variant, KeptNorms) else KeptNorms(layer)
    try:
        yield
    finally:
        for layer, variant in zip(dora, before, strict=True):
            layer.lora_variant[NAME] = variant


def _dora(model: Any) -> list[Any]:
    return [layer for layer in layers(model) if NAME in layer.lora_variant]


def squared_norms(layer: Any) -> Tensor:
    """|W|^2 per row [O], float32; it never changes."""
    return torch.cat([some_OI.float().square().sum(1) for some_OI in _rows(layer)])


@torch.no_grad()
def norms(layer: Any, squares_O: Tensor) -> Tensor:
    """n = |W + s B A| per row [O], float32, from the very weights that the forward pass reads.

    n^2 = |W|^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B), without a dense B A. squares: squared_norms().
    """
    a_RI, b_OR, scale = layer.lora_A[NAME].weight.float(), layer.lora_B[NAME].weight.float(), layer.scaling[NAME]
    wa_OR = torch.cat([some_OI.float() @ a_RI.t() for some_OI in _rows(layer)])
    more_O = (b_OR * (2 * scale * wa_OR + scale**2 * (b_OR @ (a_RI @ a_RI.t())))).sum(1)
    return (squares_O + more_O).clamp_min(0).sqrt()


def _rows(layer: Any) -> Iterator[Tensor]:
    base = layer.get_base_layer()
    assert base.bias is None, "Gemma's linears have no bias"
    return bitsandbytes.row_chunks(base.weight, _ROWS)


def _whole(alpha: float) -> float:
    """PEFT's lora_alpha is an integer in most readers' eyes; 16.0 is written as 16."""
    return int(alpha) if float(alpha).is_integer() else alpha
