"""The wall around PEFT: our op at its seam computes what PEFT computes, and what we write stock PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.backends import hub, peft
from trainer.config import Config, load
from trainer.errors import ConfigError, ModelError
from trainer.training import loop, measure
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


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts our ops within the block, where torch dispatches them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += func is torch.ops.trinity.dora.default
        self.backward += func is torch.ops.trinity.dora_backward.default
        return func(*args, **(kwargs or {}))


def test_every_targeted_linear_runs_our_op_when_frozen(model: Any) -> None:
    with Calls() as calls:
        logits(model)
        assert calls.forward == 0, "PEFT's own"
        with peft.frozen_norms(model):
            logits(model)
    assert (calls.forward, calls.backward) == (len(peft.layers(model)), 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_targeted_linear_runs_our_op_in_training_and_in_a_recompute(model: Any, checkpointing: bool) -> None:
    assert peft.keep_norms(model, new=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Calls() as calls:
        gradients(model.train())
    count = len(peft.layers(model))
    assert (calls.forward, calls.backward) == ((1 + checkpointing) * count, count)


@pytest.mark.parametrize("sabotage", ["alpha / r instead of alpha / sqrt(r)", "magnitudes forgotten"])
def test_a_wrong_scale_or_gain_would_show(model: Any, sabotage: str) -> None:
    """Sentinel of the equality above."""
    expected = logits(model)
    with peft.frozen_norms(model):
        for layer in peft.layers(model):
            if sabotage.startswith("alpha"):
                layer.scaling[peft.NAME] = layer.lora_alpha[peft.NAME] / layer.r[peft.NAME]
            else:
                layer.lora_variant[peft.NAME].norms_O.copy_(layer.lora_magnitude_vector[peft.NAME].weight.detach())
        assert float((logits(model) - expected).abs().max()) > 0.1


def gradients(made: Any) -> dict[str, torch.Tensor]:
    made.zero_grad()
    made(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


def test_our_op_has_pefts_gradients(model: Any) -> None:
    expected = gradients(model.train())
    assert peft.keep_norms(model, new=False)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 3 * len(peft.layers(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_one_linear_computes_what_pefts_does_forward_and_backward(model: Any) -> None:
    """Without the layers between, that amplify rounding: each linear to float32's own precision."""
    for layer in peft.layers(model)[:7]:
        x = torch.randn(5, 9, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
        weights = (x, layer.lora_A[peft.NAME].weight, layer.lora_B[peft.NAME].weight, layer.lora_magnitude_vector[peft.NAME].weight)
        dy = torch.randn(5, 9, layer.out_features, generator=torch.Generator().manual_seed(2))
        y = layer(x)
        expected = [y.detach(), *torch.autograd.grad(y, weights, dy)]
        layer.lora_variant[peft.NAME] = peft.KeptNorms(layer)
        y = layer(x)
        for one, other in zip([y.detach(), *torch.autograd.grad(y, weights, dy)], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_norms_are_those_of_the_dense_matrix(model: Any) -> None:
    """Against float64."""
    from peft.utils.integrations import dequantize_module_weight

    layer = peft.layers(model)[6]
    a, b, scale = layer.lora_A[peft.NAME].weight.double(), layer.lora_B[peft.NAME].weight.double(), layer.scaling[peft.NAME]
    dense = dequantize_module_weight(layer.get_base_layer()).double() + scale * (b @ a)
    torch.testing.assert_close(peft.KeptNorms(layer).norms_O.double(), torch.linalg.norm(dense, dim=1), rtol=1e-6, atol=0)


def test_a_new_adapter_leaves_the_base_as_it_is_to_the_bit(cfg: Config) -> None:
    made = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg))).eval()
    assert peft.keep_norms(made, new=True)
    peft.refresh_norms(made)
    for layer in peft.layers(made):
        assert torch.equal(layer.lora_magnitude_vector[peft.NAME].weight, layer.lora_variant[peft.NAME].norms_O)
    assert torch.equal(logits(made), logits(models.base(cfg, models.nf4(cfg)).eval()))
    with torch.no_grad():
        peft.layers(made)[0].lora_magnitude_vector[peft.NAME].weight.mul_(1 + 1e-6)
    assert not torch.equal(logits(made), logits(models.base(cfg, models.nf4(cfg)).eval())), "the last digit would show"


def test_magnitudes_that_were_trained_are_never_touched(model: Any, cfg: Config, tmp_path: Path) -> None:
    """Not by the seam, not by a refresh, not by a load."""
    peft.save(model, tmp_path)
    trained = magnitudes(model)
    loaded = peft.load(models.base(cfg, models.nf4(cfg)), tmp_path, base_name=cfg.model.name).eval()
    for one in (model, loaded):
        assert peft.keep_norms(one, new=False)
        peft.refresh_norms(one)
        with peft.frozen_norms(one):
            logits(one)
        assert all(torch.equal(*pair) for pair in zip(magnitudes(one), trained, strict=True))


def magnitudes(made: Any) -> list[torch.Tensor]:
    return [layer.lora_magnitude_vector[peft.NAME].weight.detach().clone() for layer in peft.layers(made)]


def test_kept_norms_follow_the_weights_only_when_refreshed(model: Any) -> None:
    """Sentinel: a forgotten refresh shows."""
    assert peft.keep_norms(model, new=False)
    with torch.no_grad():
        for layer in peft.layers(model):
            layer.lora_B[peft.NAME].weight.mul_(2.0)
    stale = logits(model)
    with peft.frozen_norms(model):
        frozen = logits(model)
    assert torch.equal(logits(model), stale), "a measurement on the side heals nothing"
    peft.refresh_norms(model)
    fresh = logits(model)
    assert torch.equal(fresh, frozen)
    assert float((stale - fresh).abs().max()) > 0.1


def test_dropout_is_refused_with_the_remedy(tiny_config: Make) -> None:
    cfg = tiny_config("adapter.dropout=0.1")
    made = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
    with pytest.raises(ConfigError, match=r"adapter.dropout = 0.1: .* set adapter.dropout=0 or kernels.dora=stock"):
        loop.computing(cfg, made)
    how = loop.computing(tiny_config("adapter.dropout=0.1", "kernels.dora=stock"), made)
    assert how.active == () and not any(isinstance(layer.lora_variant[peft.NAME], peft.KeptNorms) for layer in peft.layers(made))


@pytest.mark.parametrize(
    ("overrides", "active", "ours"),
    [
        ((), ("dora: trinity::dora at PEFT's seam",), True),
        (("kernels.dora=stock",), (), False),
        (("adapter.dora=false",), (), False),
    ],
)
def test_the_loop_installs_what_the_config_names_and_says_so(
    tiny_config: Make, overrides: tuple[str, ...], active: tuple[str, ...], ours: bool
) -> None:
    cfg = tiny_config(*overrides)
    made = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
    how = loop.computing(cfg, made)
    with Calls() as calls:
        how.hidden({"input_ids": IDS})
    assert (how.active, calls.forward) == (active, ours * len(peft.layers(made)))


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


SHORT = ("train.max_steps=30", "train.batch_records=4", "train.tokens_per_step=120", "train.valid_every=30", "train.valid_records=4")


@pytest.mark.slow
def test_thirty_steps_of_the_270m_take_the_course_that_pefts_dora_takes(tiny_inputs: Any, tmp_path: Path, root: Path) -> None:
    """The embedded model, the same records in the same order; only kernels.dora differs."""
    from trainer.stages import prepare, train

    usual = [f"paths.cache={root / '.cache'}", f"data.path={root / 'data' / 'sample.jsonl'}", *SHORT]
    inputs, losses = tiny_inputs._replace(directories={"prepare": tmp_path / "prepare"}), {}
    (tmp_path / "prepare").mkdir()
    prepare.run(load("gemma3-270m-cpu", usual), inputs, tmp_path / "prepare")
    for who, active in (("ours", (peft.SEAM,)), ("stock", ())):
        (tmp_path / who).mkdir()
        facts = train.run(load("gemma3-270m-cpu", [*usual, f"kernels.dora={who}"]), inputs, tmp_path / who)
        assert facts.kernels == active
        losses[who] = [point.loss for point in facts.train_loss]
    assert len(losses["ours"]) == 30 and sum(losses["ours"][-5:]) < 0.5 * sum(losses["ours"][:5]), "it learns"
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-2)
