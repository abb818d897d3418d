r"""Merge an adapter into its base exactly as it was trained, a block of rows at a time.

    DoRA (arXiv 2402.09353, section 4):  V = W + s B A,  n_o = ||V_o||_2,  g = m / n,  merged = g * V
    LoRA (dora = false):                 merged = V

    W [O, I] the base as training saw it (dequantised NF4), A [R, I], B [O, R], m [O], s = alpha / sqrt(R) with rsLoRA
    (arXiv 2312.03732, theorem 3.2), else alpha / R.

Everything about the adapter comes from PEFT's own files, never from the config: with another rank than the trained one the
scale would be wrong by the square root of their ratio, and no error would say so. A row of V needs only the same rows of W
and B, so blocks of rows are exact and no second copy of a matrix ever exists.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer import shards
from trainer.errors import ArtifactError, ModelError
from trainer.gemma3 import Size

Array = npt.NDArray[np.float32]

_KEY = re.compile(r"\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")


@dataclass(frozen=True)
class Part:
    """What an adapter adds to one linear."""

    a_RI: Array  # noqa: N815  # shape suffix
    b_OR: Array  # noqa: N815  # shape suffix
    m_O: Array | None  # noqa: N815  # shape suffix


@dataclass(frozen=True)
class Adapter:
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    parts: Mapping[tuple[int, str], Part]
    """By layer and linear, `(3, "q_proj")`."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Rows(Protocol):
    """A matrix of which only slices of rows are asked for; a numpy array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Array: ...


def merged(w_OI: Rows, part: Part | None, scale: float, start: int, stop: int) -> Array:
    """Rows start..stop of g*(W + sBA); without a part the rows of W themselves."""
    w = w_OI[start:stop]
    if part is None:
        return w
    v: Array = np.matmul(part.b_OR[start:stop] * np.float32(scale), part.a_RI, dtype=np.float32)
    v += w
    if part.m_O is not None:
        # The norm's sum runs over up to 15,360 squares: numpy adds them pairwise, so float32 is enough.
        norm_O = np.sqrt(np.sum(v * v, axis=1, dtype=np.float32))
        v *= (part.m_O[start:stop] / norm_O)[:, None]
    return v


def read(directory: Path, size: Size) -> Adapter:
    """Read PEFT's adapter_config.json and adapter_model.safetensors and hold them against the base's shapes.

    Raises:
        ArtifactError: files missing, an adapter of a kind that is not merged here, or one that was made for another base;
            names every tensor that does not fit.
    """
    config = _config(directory)
    rank, dora = int(config["r"]), bool(config.get("use_dora", False))
    found, problems = _grouped(_tensors(directory / "adapter_model.safetensors"))
    for (layer, name), group in sorted(found.items()):
        problems += _misfits(layer, name, group, size, rank, dora)
    names = {name for _, name in found} | (set(config["target_modules"]) if isinstance(config["target_modules"], list) else set())
    wanted = {(layer, name) for layer in range(size.num_layers) for name in names if name in size.linears()}
    problems += [f"layers.{layer}.{name}: a target of the adapter, but not in its file" for layer, name in sorted(wanted - found.keys())]
    if problems or not found:
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ArtifactError(
            f"{directory}: this adapter was made for another base model than the one of this run "
            f"({size.num_layers} layers, hidden size {size.hidden_size}); train again, or set model.name to its base",
            *(shown or ["the file holds no adapter at all"]),
        )
    parts = {at: Part(group["lora_A"], group["lora_B"], group.get("lora_magnitude_vector")) for at, group in found.items()}
    return Adapter(rank, float(config["lora_alpha"]), bool(config.get("use_rslora", False)), dora, parts)


def _grouped(tensors: Mapping[str, Array]) -> tuple[dict[tuple[int, str], dict[str, Array]], list[str]]:
    """Tensors by (layer, linear) and kind, and a problem for each that is no part of a LoRA on the text model."""
    found: dict[tuple[int, str], dict[str, Array]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = _KEY.search(key)
        if match is None:
            problems.append(f"{key}: not a part of a LoRA on a linear of the text model")
        else:
            found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    return found, problems


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; an adapter is PEFT's adapter_config.json and adapter_model.safetensors") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}; run the stage train again") from error
    problems = [f"{path}: no key {key!r}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    problems += [
        f"{path}: {key} = {config[key]!r} cannot be merged here; train without it"
        for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        problems.append(f'{path}: bias = {config["bias"]!r} cannot be merged here; train with bias = "none"')
    if problems:
        raise ArtifactError(*problems)
    return config


def _misfits(layer: int, name: str, group: Mapping[str, Array], size: Size, rank: int, dora: bool) -> list[str]:
    where = f"layers.{layer}.{name}"
    shape = size.linears().get(name)
    if shape is None or layer >= size.num_layers:
        return [f"{where}: the base has no such linear"]
    rows, columns = shape
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (rank, columns), "lora_B": (rows, rank)}
    if dora:
        wanted["lora_magnitude_vector"] = (rows,)
    problems = [f"{where}.{kind}: missing" for kind in wanted.keys() - group.keys()]
    problems += [f"{where}.{kind}: there, though the config says use_dora = false" for kind in group.keys() - wanted.keys()]
    for kind in wanted.keys() & group.keys():
        if group[kind].shape != wanted[kind]:
            problems.append(f"{where}.{kind}: shape {list(group[kind].shape)}, but the base needs {list(wanted[kind])}")
        elif not np.isfinite(group[kind]).all():
            problems.append(f"{where}.{kind}: holds NaN or infinity")
    return problems


def _tensors(path: Path) -> dict[str, Array]:
    try:
        return {name: shards.floats(entry) for name, entry in shards.entries(path).items()}
    except ModelError as error:
        raise ArtifactError(f"{path}: missing, cut short or not a safetensors file; run the stage train again") from error
