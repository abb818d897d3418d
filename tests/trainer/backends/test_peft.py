"""The wall around PEFT: frozen norms compute what PEFT computes, and what we write stock PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.backends import hub, peft
from trainer.config import Config
from trainer.errors import ModelError
from trainer.training import measure
from trainer.training import model as models
from trainer.training.batches import row

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def cfg(tiny_config: Make) -> Config:
    return tiny_config()


@pytest.fixture
def model(cfg: Config) -> Any:
    """An adapter on which everything matters: random B, magnitudes up to 20 % off the norms."""
    torch.set_num_threads(1)
    made = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
    shake(made)
    made.eval()
    return made


def shake(made: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in peft.layers(made):
            weight = layer.lora_B[peft.NAME].weight
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
            magnitude = layer.lora_magnitude_vector[peft.NAME].weight
            magnitude.mul_(0.8 + 0.4 * torch.rand(magnitude.shape, generator=generator))


IDS = torch.tensor([[2, 105, 30, 40, 50, 106, 33, 44]])


def logits(made: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = made(input_ids=IDS).logits
    return found


def test_every_targeted_linear_carries_the_adapter(model: Any, cfg: Config) -> None:
    size = hub.size(cfg.model, cfg.paths.cache)
    assert len(peft.layers(model)) == 7 * size.num_layers


def test_frozen_norms_compute_what_peft_computes(model: Any) -> None:
    expected = logits(model)
    with peft.frozen_norms(model):
        variants = [layer.lora_variant[peft.NAME] for layer in peft.layers(model)]
        assert all(isinstance(variant, peft.KeptNorms) for variant in variants)
        found = logits(model)
    # two float32 summation orders of products over 128 columns and a few layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), expected), "afterwards PEFT's own forward is back"


def test_the_seam_is_really_used(model: Any) -> None:
    calls: list[int] = []
    with peft.frozen_norms(model):
        for layer in peft.layers(model):
            layer.lora_variant[peft.NAME] = Counting(layer.lora_variant[peft.NAME].norms, calls)
        logits(model)
    assert len(calls) == len(peft.layers(model))


class Counting(peft.KeptNorms):
    def __init__(self, norms: torch.Tensor, calls: list[int]) -> None:
        super().__init__(norms)
        self._calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._calls.append(1)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("sabotage", ["alpha / r instead of alpha / sqrt(r)", "magnitudes forgotten"])
def test_a_wrong_scale_or_gain_would_show(model: Any, sabotage: str) -> None:
    """Sentinel of the equality above."""
    expected = logits(model)
    with peft.frozen_norms(model):
        for layer in peft.layers(model):
            if sabotage.startswith("alpha"):
                layer.scaling[peft.NAME] = layer.lora_alpha[peft.NAME] / layer.r[peft.NAME]
            else:
                layer.lora_variant[peft.NAME].norms.copy_(layer.lora_magnitude_vector[peft.NAME].weight.detach())
        assert float((logits(model) - expected).abs().max()) > 0.1


def gradients(made: Any) -> dict[str, torch.Tensor]:
    made.zero_grad()
    made(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


def test_kept_norms_have_pefts_gradients(model: Any) -> None:
    expected = gradients(model.train())
    assert peft.keep_norms(model)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 3 * len(peft.layers(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_kept_norms_follow_the_weights_only_when_refreshed(model: Any) -> None:
    """Sentinel: a forgotten refresh shows."""
    assert peft.keep_norms(model)
    with torch.no_grad():
        for layer in peft.layers(model):
            layer.lora_B[peft.NAME].weight.mul_(2.0)
    stale = logits(model)
    peft.refresh_norms(model)
    fresh = logits(model)
    with peft.frozen_norms(model):
        torch.testing.assert_close(fresh, logits(model), rtol=0, atol=0)
    assert float((stale - fresh).abs().max()) > 0.1


def test_with_dropout_pefts_own_forward_stays(cfg: Config) -> None:
    dropping = cfg.model_copy(update={"adapter": cfg.adapter.model_copy(update={"dropout": 0.1})})
    assert not peft.keep_norms(models.with_new_adapter(dropping, models.base(cfg, models.nf4(cfg))))


def test_the_base_alone_is_the_model_without_an_adapter(model: Any, cfg: Config) -> None:
    bare = models.base(cfg, models.nf4(cfg)).eval()
    with peft.base_alone(model), peft.frozen_norms(model):
        assert torch.equal(logits(model), logits(bare))
    assert not torch.allclose(logits(model), logits(bare), atol=0.1), "the adapter is back"


def test_stock_peft_loads_our_files_and_computes_the_same(model: Any, cfg: Config, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    peft.save(model, tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models.nf4(cfg), dtype=torch.float32), str(tmp_path))
    torch.testing.assert_close(logits(stock.eval()), logits(model), rtol=0, atol=0)


def test_stock_peft_loads_them_on_the_hubs_multimodal_layout_too(model: Any, cfg: Config, tmp_path: Path) -> None:
    """What a user does with the original download: 16-bit shards quantised while loading, vision tower left out."""
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, Gemma3Config, Gemma3ForCausalLM

    peft.save(model, tmp_path)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    original = hub.weights(cfg.model, cfg.paths.cache)
    base = Gemma3ForCausalLM.from_pretrained(
        original,
        config=Gemma3Config.from_pretrained(original).text_config,
        key_mapping={r"^language_model\.": ""},
        dtype=torch.float32,
        quantization_config=four_bit,
        device_map={"": "cpu"},
    )
    stock = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


def test_equal_adapters_give_equal_bytes_and_name_the_original_base(model: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        peft.save(model, tmp_path / name)
    for file in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    found = json.loads((tmp_path / "one" / peft.CONFIG).read_text())
    assert found["base_model_name_or_path"] == "random:tiny" and found["target_modules"] == sorted(found["target_modules"])


def test_an_adapter_for_another_base_is_refused(model: Any, cfg: Config, tmp_path: Path) -> None:
    peft.save(model, tmp_path)
    with pytest.raises(ModelError, match=r"belongs to 'random:tiny', not to 'google/gemma-3-12b-it'"):
        peft.load(models.base(cfg, models.nf4(cfg)), tmp_path, base_name="google/gemma-3-12b-it")


def test_the_loss_is_equal_in_train_and_in_eval_mode(model: Any, tiny_prepared: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first forward in eval mode, and DoRA reads garbage."""
    from trainer.dataset import records
    from trainer.training.batches import examples

    rows = [row(one) for one in examples(records.read(tiny_prepared / "valid.jsonl"))]
    with measure.evaluating(model):
        in_eval = measure.loss(model, rows, 4)
        with peft.frozen_norms(model):
            frozen = measure.loss(model, rows, 4)
    model.train()
    with torch.no_grad():
        in_train = measure.loss(model, rows, 4)
    assert in_train == pytest.approx(in_eval, rel=1e-6) == pytest.approx(frozen, rel=1e-4)
