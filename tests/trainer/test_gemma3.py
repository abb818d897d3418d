"""Sizes, names and config.json of Gemma 3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer import gemma3, random_weights
from trainer.errors import ModelError
from trainer.gemma3 import SIZES, Size


def write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_12b_has_the_parameters_that_were_counted_on_the_released_weights() -> None:
    size = SIZES["12b"]
    assert sum(out * wide for out, wide in size.linears().values()) == 224_133_120
    assert size.vocab_size * size.hidden_size == 1_006_878_720
    # Whole multimodal model as published: 12,187,325,040 parameters.
    shapes = random_weights.hub_tensors(size, random_weights.Vision())
    assert sum(_count(shape) for shape in shapes.values()) == 12_187_325_040
    assert size.num_parameters == sum(_count(shape) for shape in size.tensors().values())


def test_270m_has_the_parameters_of_its_name() -> None:
    assert SIZES["270m"].num_parameters == 268_098_176


def test_one_layer_in_six_is_global() -> None:
    assert [layer for layer in range(48) if SIZES["12b"].is_global(layer)] == [5, 11, 17, 23, 29, 35, 41, 47]


@pytest.mark.parametrize("name", SIZES)
def test_a_size_survives_the_text_only_config(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", SIZES[name].to_config("bfloat16"))
    assert gemma3.read(path) == SIZES[name]
    assert gemma3.named(gemma3.read(path)) == name


@pytest.mark.parametrize("name", SIZES)
def test_a_size_survives_the_multimodal_config(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", random_weights.config(SIZES[name], random_weights.Vision()))
    assert gemma3.read(path) == SIZES[name]


def test_the_config_of_the_hub_is_read_where_it_leaves_defaults_out(tmp_path: Path) -> None:
    """The hub's 12B says no vocabulary, head_dim or rope base; its 4B not even the number of heads."""
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "rope_scaling": scaling, "sliding_window": 1024}
    assert gemma3.read(write(tmp_path / "4b.json", {"model_type": "gemma3", "text_config": text})) == SIZES["4b"]
    text |= {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8}
    assert gemma3.read(write(tmp_path / "12b.json", {"model_type": "gemma3", "text_config": text})) == SIZES["12b"]


def test_the_config_that_transformers_saves_is_read_alike(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3TextConfig

    for name, size in SIZES.items():
        flat = write(tmp_path / f"{name}.json", size.to_config("bfloat16"))
        saved = Gemma3TextConfig(**json.loads(flat.read_text(encoding="utf-8"))).to_dict()
        assert gemma3.read(write(tmp_path / f"{name}-saved.json", saved)) == size
        nested = random_weights.config(size, random_weights.Vision())
        assert gemma3.read(write(tmp_path / f"{name}-nested.json", Gemma3Config(**nested).to_dict())) == size


def test_a_changed_value_changes_the_size(tmp_path: Path) -> None:
    size = SIZES["12b"]
    for changed in (
        replace(size, rope_scaling=4.0),
        replace(size, sliding_pattern=3),
        replace(size, rms_norm_eps=1e-5),
        replace(size, rope_local_theta=5e3),
    ):
        assert gemma3.read(write(tmp_path / "config.json", changed.to_config("bfloat16"))) == changed != size


def test_another_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_type is 'llama'.*unsloth/gemma-3-12b-it"):
        gemma3.read(write(tmp_path / "config.json", {"model_type": "llama"}))


def test_a_missing_and_a_broken_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.json: not there"):
        gemma3.read(tmp_path / "absent.json")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
        gemma3.read(tmp_path / "config.json")


def test_everything_that_is_wrong_with_a_config_is_said_at_once(tmp_path: Path) -> None:
    tree = SIZES["1b"].to_config("bfloat16") | {
        "hidden_size": None,
        "head_dim": "wide",
        "final_logit_softcapping": 30.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    with pytest.raises(ModelError) as caught:
        gemma3.read(write(tmp_path / "config.json", tree))
    text = str(caught.value)
    assert all(word in text for word in ("hidden_size is None", "head_dim is 'wide'", "final_logit_softcapping", "'yarn'"))


def test_layer_types_that_no_pattern_makes_are_refused(tmp_path: Path) -> None:
    tree = SIZES["tiny"].to_config("bfloat16") | {"layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ModelError, match="layer_types"):
        gemma3.read(write(tmp_path / "config.json", tree))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", None),
        ("model.vision_tower.post_layernorm.bias", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_every_checkpoint_s_names_lead_to_the_text_only_ones(name: str, text: str | None) -> None:
    assert gemma3.text_name(name) == text


def test_the_names_are_those_of_transformers() -> None:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES["tiny"].to_config("float32")))
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == SIZES["tiny"].tensors()


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def test_sizes_are_values() -> None:
    assert isinstance(SIZES["tiny"], Size)
    with pytest.raises(AttributeError):
        SIZES["tiny"].num_layers = 3  # type: ignore[misc]
