"""Random weights are what the hub would have sent, in everything but their values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer import gemma3, random_weights, shards
from trainer.backends import tiny
from trainer.gemma3 import SIZES


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "tiny"
    assert random_weights.main([str(path), "--size", "tiny", "--seed", "7"]) == 0
    return path


def test_stock_transformers_loads_the_layout_with_no_key_missing_or_unexpected(directory: Path) -> None:
    import torch
    from transformers import Gemma3ForConditionalGeneration

    model, info = Gemma3ForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    found = shards.tensors(directory)
    ours = shards.floats(found["language_model.model.layers.1.mlp.down_proj.weight"])
    assert np.array_equal(model.model.language_model.layers[1].mlp.down_proj.weight.detach().float().numpy(), ours)
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()


def test_a_tensor_that_is_left_out_is_noticed(directory: Path, tmp_path: Path) -> None:
    """Sentinel of the test above: it can fail."""
    from transformers import Gemma3ForConditionalGeneration

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((directory / "config.json").read_bytes())
    writer = shards.Writer(copy, 10_000_000)
    for name, entry in shards.tensors(directory).items():
        if name != "language_model.model.norm.weight":
            writer.add(name, entry.dtype, entry.shape, shards.bits(entry))
    writer.finish()
    _, info = Gemma3ForConditionalGeneration.from_pretrained(copy, output_loading_info=True)
    assert info["missing_keys"] == {"model.language_model.norm.weight"}


def test_the_directory_is_the_hub_s(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert config["text_config"]["model_type"] == "gemma3_text" and config["vision_config"]["model_type"] == "siglip_vision_model"
    index = json.loads((directory / shards.INDEX).read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) >= 3
    assert index["weight_map"].keys() == random_weights.hub_tensors(SIZES["tiny"], random_weights.TINY_VISION).keys()
    assert "language_model.lm_head.weight" not in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in shards.tensors(directory).values())
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        {*index["weight_map"].values(), "config.json", shards.INDEX, "tokenizer.json", "tokenizer_config.json"}
    )


def test_12b_s_config_is_the_one_that_google_publishes() -> None:
    """As on the hub: what equals the defaults is left out of text_config."""
    config = random_weights.config(SIZES["12b"], random_weights.Vision())
    assert config["text_config"] == {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    assert (config["boi_token_index"], config["eoi_token_index"], config["image_token_index"]) == (255_999, 256_000, 262_144)
    assert config["eos_token_id"] == [1, 106] and config["mm_tokens_per_image"] == 256


def test_the_values_are_sane(directory: Path) -> None:
    for name, entry in shards.tensors(directory).items():
        values = shards.floats(entry)
        assert entry.dtype == "BF16" and np.isfinite(values).all() and (values != 0).all(), name
        assert abs(float(values.mean())) < 0.05, name
        assert 0.01 < float(values.std()) < 0.2, name


def test_activations_stay_finite_and_lively(directory: Path) -> None:
    import torch
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.arange(3, 67)[None], output_hidden_states=True)
    assert out.logits.isfinite().all() and 0.3 < out.logits.std() < 5
    assert max(state.abs().max() for state in out.hidden_states) < 1000


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(directory: Path, tmp_path: Path) -> None:
    for seed in ("7", "8"):
        assert random_weights.main([str(tmp_path / seed), "--seed", seed]) == 0
    names = [path.name for path in shards.files(directory)]
    assert all((tmp_path / "7" / name).read_bytes() == (directory / name).read_bytes() for name in names)
    assert any((tmp_path / "8" / name).read_bytes() != (directory / name).read_bytes() for name in names)


def test_a_given_tokenizer_goes_into_the_directory(tmp_path: Path) -> None:
    tiny.tokenizer().save(str(tmp_path / "mine.json"))
    assert random_weights.main([str(tmp_path / "model"), "--tokenizer", str(tmp_path / "mine.json")]) == 0
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text()) == json.loads((tmp_path / "mine.json").read_text())


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert random_weights.main([str(tmp_path)]) == 2
    assert "already there and not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    assert random_weights.main([str(tmp_path / "model"), "--tokenizer", str(tmp_path / "broken.json")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


def test_the_tiny_tokenizer_is_whole(tmp_path: Path) -> None:
    made = tiny.tokenizer()
    assert 512 < made.get_vocab_size() <= 600
    assert [made.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")] == [
        0,
        1,
        2,
        3,
        105,
        106,
    ]
    for text in ("every day at noon", "  two  spaces ", "Größe 漢字 \U0001f600\n\n\n*/5 * * * *", "<start_of_turn>user\nhi<end_of_turn>\n"):
        ids = made.encode(text, add_special_tokens=False).ids
        assert made.decode(ids, skip_special_tokens=False) == text
        assert gemma3.SIZES["tiny"].vocab_size > max(ids) and 3 not in ids
