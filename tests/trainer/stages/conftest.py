"""A tiny model whose adapter matters: random B, and magnitudes 20 % off the norms. Then evaluate and export, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from trainer.backends import bitsandbytes
from trainer.config import Config
from trainer.facts import ExportFacts, LossPoint, TrainFacts
from trainer.gemma3 import linear_name

RANK, ALPHA = 16, 16.0
"""Scale 4 with rsLoRA, 1 without."""


class Chain(NamedTuple):
    cfg: Config
    inputs: Any
    export: Path
    facts: ExportFacts


def trained_facts(base_sha256: str) -> TrainFacts:
    point = LossPoint(step=4, loss=1.0)
    return TrainFacts(
        backend="transformers", device="cpu", rank=RANK, alpha=ALPHA, dora=True, rslora=True, max_tokens=256, packed=False, steps=5,
        accumulation=1, num_tokens=1, wall_s=1.0, tokens_per_s=1.0, peak_bytes=1, train_loss=(point,), valid_loss=(point,), best_step=4,
        base_sha256=base_sha256,
    )  # fmt: skip


def write_adapter(folder: Path, weights: bitsandbytes.Nf4Weights, base_name: str, seed: int = 0) -> None:
    """PEFT's two files: sBA half as large as W, m alternately 20 % above and below the norms of W + sBA."""
    random, tensors = np.random.default_rng(seed), {}
    scale = ALPHA / RANK**0.5
    for layer in range(weights.size.num_layers):
        for name, (rows, columns) in weights.size.linears().items():
            w = weights.linear(layer, name)
            a = random.normal(size=(RANK, columns)).astype(np.float32)
            b = random.normal(size=(rows, RANK)).astype(np.float32) * np.float32(0.5 * w.std() / (scale * RANK**0.5))
            norms = np.linalg.norm(w + scale * b @ a, axis=1)
            key = "base_model.model." + linear_name(layer, name).removesuffix(".weight")
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
            tensors[f"{key}.lora_magnitude_vector"] = norms * np.where(np.arange(rows) % 2, 1.2, 0.8).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "use_rslora": True,
        "use_dora": True,
        "bias": "none",
        "target_modules": sorted(weights.size.linears()),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_weights(tiny_config: Callable[..., Config]) -> bitsandbytes.Nf4Weights:
    cfg = tiny_config()
    return bitsandbytes.Nf4Weights(bitsandbytes.nf4_state(cfg.model, cfg.paths.cache))


@pytest.fixture(scope="session")
def chain(
    tiny_config: Callable[..., Config], tiny_inputs: Any, tiny_weights: bitsandbytes.Nf4Weights, tmp_path_factory: pytest.TempPathFactory
) -> Chain:
    from trainer.stages import evaluate, export

    cfg = tiny_config("evaluate.max_new_tokens=12")
    train, evaluated, exported = (tmp_path_factory.mktemp(name) for name in ("train", "evaluate", "export"))
    write_adapter(train / "best", tiny_weights, cfg.model.name)
    inputs = type(tiny_inputs)({**tiny_inputs.directories, "train": train}, {TrainFacts: trained_facts(tiny_weights.sha256)})
    facts = evaluate.run(cfg, inputs, evaluated)
    inputs = type(tiny_inputs)({**inputs.directories, "evaluate": evaluated}, {**inputs.known, type(facts): facts})
    written = export.run(cfg, inputs, exported)
    inputs = type(tiny_inputs)({**inputs.directories, "export": exported}, {**inputs.known, ExportFacts: written})
    return Chain(cfg, inputs, exported, written)
