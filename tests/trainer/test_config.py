from __future__ import annotations

import math
from pathlib import Path

import pytest

from trainer.config import Config, load, presets
from trainer.errors import ConfigError


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads_and_names_its_run_after_itself(preset: str) -> None:
    assert load(preset).run.name == preset


def test_the_product_preset_is_what_the_project_is_named_for() -> None:
    cfg = load("gemma3-12b-t4")
    assert (cfg.adapter.rank, cfg.data.max_tokens, cfg.adapter.dora, cfg.adapter.rslora, len(cfg.adapter.targets)) == (
        64,
        4096,
        True,
        True,
        7,
    )
    assert (cfg.model.name, cfg.model.backend, cfg.model.double_quant) == ("unsloth/gemma-3-12b-it", "unsloth", True)


def test_scale_divides_by_the_root_of_the_rank_only_with_rslora() -> None:
    assert load("tiny", ["adapter.rank=64", "adapter.alpha=16"]).adapter.scale == 16 / math.sqrt(64)
    assert load("tiny", ["adapter.rank=64", "adapter.alpha=16", "adapter.rslora=false"]).adapter.scale == 16 / 64


def test_overrides_are_typed_like_toml_and_bare_words_are_text() -> None:
    cfg = load("tiny", ["train.learning_rate=3e-4", "run.name=mine", "data.path=some where/x.json", 'adapter.targets=["q_proj"]'])
    assert (cfg.train.learning_rate, cfg.run.name, cfg.data.path, cfg.adapter.targets) == (
        3e-4,
        "mine",
        Path("some where/x.json"),
        ("q_proj",),
    )


def test_all_problems_are_reported_at_once_and_each_names_its_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load("tiny", ["train.epoch=1", "adapter.rank=many", "model.backend=unsloth", "nonsense", "extra.key=1"])
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for part in ("train.epoch", "epochs", "adapter.rank", '"many"', "device", "nonsense", "extra"):
        assert part in text


def test_a_context_that_serving_would_not_have_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="num_ctx"):
        load("tiny", ["data.max_tokens=1024"])


def test_an_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="gemma3-12b-t4"):
        load("gemma")


def test_a_broken_preset_file_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[model\n")
    with pytest.raises(ConfigError, match=str(path)):
        load(str(path))


def test_config_is_frozen() -> None:
    cfg = Config()
    with pytest.raises(ValueError, match="frozen"):
        cfg.run.name = "other"  # type: ignore[misc]
