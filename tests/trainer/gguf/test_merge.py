"""The merge is the function that PEFT trains, tensor by tensor, and nothing else is accepted as an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trainer.errors import ArtifactError
from trainer.gemma3 import SIZES, linear_name
from trainer.gguf import merge
from trainer.gguf.merge import Part

TINY = SIZES["tiny"]


def adapter(folder: Path, *, rank: int = 4, **settings: Any) -> Path:
    config = {
        "r": rank,
        "lora_alpha": 8,
        "use_rslora": True,
        "use_dora": True,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
    } | settings
    random, tensors = np.random.default_rng(1), {}
    for layer in range(TINY.num_layers):
        for name in ("q_proj", "down_proj"):
            rows, columns = TINY.linears()[name]
            key = "base_model.model." + linear_name(layer, name).removesuffix(".weight")
            tensors[f"{key}.lora_A.weight"] = random.normal(size=(rank, columns)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(size=(rows, rank)).astype(np.float32)
            if config["use_dora"]:
                tensors[f"{key}.lora_magnitude_vector"] = random.uniform(0.5, 1.5, size=rows).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def in_float64(w: Any, part: Part, scale: float) -> Any:
    v = w.astype(np.float64) + scale * part.b_OR.astype(np.float64) @ part.a_RI.astype(np.float64)
    return v if part.m_O is None else part.m_O[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)


@pytest.mark.parametrize("dora", [True, False])
def test_blocks_of_rows_put_together_are_the_formula(tmp_path: Path, dora: bool) -> None:
    read = merge.read(adapter(tmp_path, use_dora=dora), TINY)
    part = read.parts[1, "down_proj"]
    w = np.random.default_rng(2).normal(size=TINY.linears()["down_proj"]).astype(np.float32)
    blocks = np.concatenate([merge.merged(w, part, read.scale, start, min(start + 100, len(w))) for start in range(0, len(w), 100)])
    wanted = in_float64(w, part, read.scale)
    assert blocks.dtype == np.float32
    limit = 8 * np.finfo(np.float32).eps * np.sqrt(w.shape[1]) * np.abs(wanted).max()
    assert np.abs(blocks - wanted).max() < limit
    # Sentinel: the same tolerance sees alpha/r in place of alpha/sqrt(r).
    assert np.abs(merge.merged(w, part, read.alpha / read.rank, 0, len(w)) - wanted).max() > 100 * limit


def test_the_merged_matrix_computes_what_pefts_layer_computes() -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layer = torch.nn.Sequential()
    layer.add_module("q_proj", torch.nn.Linear(96, 64, bias=False))
    model = get_peft_model(layer, LoraConfig(r=8, lora_alpha=4, use_rslora=True, use_dora=True, target_modules=["q_proj"]))
    linear = model.base_model.model.q_proj
    with torch.no_grad():
        linear.lora_B["default"].weight.normal_()
        linear.lora_magnitude_vector["default"].weight.mul_(torch.rand(64) + 0.5)
        x = torch.randn(5, 96)
        wanted = model(x).numpy()
        values = [linear.lora_A["default"].weight, linear.lora_B["default"].weight, linear.lora_magnitude_vector["default"].weight]
        part = Part(*(value.detach().numpy() for value in values))
        merged = merge.merged(linear.base_layer.weight.numpy(), part, 4 / 8**0.5, 0, 64)
    np.testing.assert_allclose(x.numpy() @ merged.T, wanted, rtol=1e-4, atol=1e-4)


def test_a_linear_without_an_adapter_is_left_as_it_is() -> None:
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(merge.merged(w, None, 2.0, 1, 3), w[1:3])


def test_bfloat16_adapters_are_read_exactly(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    adapter(tmp_path)
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_torch(tensors, tmp_path / "adapter_model.safetensors")
    part = merge.read(tmp_path, TINY).parts[0, "q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert np.array_equal(part.a_RI, tensors[key].float().numpy())


def test_an_adapter_for_another_base_is_refused_and_every_tensor_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="made for another base model") as caught:
        merge.read(adapter(tmp_path), SIZES["270m"])
    text = str(caught.value)
    assert "layers.0.q_proj.lora_A: shape [4, 256], but the base needs [4, 640]" in text
    assert "layers.17.down_proj" in text or "more" in text


def test_a_missing_magnitude_is_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"]
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"layers\.1\.down_proj.lora_magnitude_vector: missing"):
        merge.read(tmp_path, TINY)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 1] = np.nan
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"layers\.1\.down_proj.lora_B: holds NaN or infinity"):
        merge.read(tmp_path, TINY)


def test_ranks_that_differ_by_layer_are_refused_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        merge.read(adapter(tmp_path, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 8}), TINY)
    assert len(caught.value.problems) == 2


def test_a_torn_file_is_one_clear_error(tmp_path: Path) -> None:
    path = adapter(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="cut short"):
        merge.read(tmp_path, TINY)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        merge.read(tmp_path, TINY)
