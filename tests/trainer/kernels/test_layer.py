"""layer.py: layers of every size's geometry against transformers' model with the adapter merged in, in calm and in loud activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from tests.trainer.kernels.toy import Answer, Loud, Toy, documents, gradient, of_ours, of_transformers, reduced, worst
from trainer.kernels import attention, plain, stack

LENGTHS = (40, 3, 27)
GEOMETRIES = ["1b", "4b", "12b", "27b"]


def both(toy: Toy) -> tuple[Answer, Answer]:
    texts, grad = documents(LENGTHS), gradient(toy.size, LENGTHS)
    ours = of_ours(toy, toy.stack(), texts, grad)
    return ours, of_transformers(toy, texts, grad)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_layers_of_every_size_are_transformers_layers(name: str) -> None:
    """Hidden states and the gradients of all seven linears; transformers' norms and rotations are in float32: 2^-24 each, some dozens."""
    ours, theirs = both(Toy(reduced(name), torch.float64))
    assert worst(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", GEOMETRIES)
def test_in_float32_they_still_are(name: str) -> None:
    ours, theirs = both(Toy(reduced(name), torch.float32))
    assert worst(ours, theirs) <= 1e-4


def test_another_window_scalar_theta_or_scaling_is_seen() -> None:
    """Sentinels, each a single number of 27B's."""
    toy = Toy(reduced("27b"), torch.float64)
    texts, grad = documents(LENGTHS), gradient(toy.size, LENGTHS)
    ours = of_ours(toy, toy.stack(), texts, grad)
    theirs = of_transformers(toy, texts, grad)
    assert worst(ours, theirs) <= 1e-5
    for wrong in (
        {"query_pre_attn_scalar": 128.0},
        {"sliding_window": 15},
        {"sliding_window": 17},
        {"rope_theta": 10_000.0},
        {"rope_local_theta": 1_000_000.0},
        {"rope_scaling": 1.0},
        {"rms_norm_eps": 1e-2},
        {"sliding_pattern": 1},
    ):
        assert worst(of_ours(toy, toy.stack(size=replace(toy.size, **wrong)), texts, grad), theirs) > 1e-4, wrong


LOUD = Loud(embedding=2.2e5, mlp=300.0)
"""Residual 8e5 and more, gate * up beyond 65504: what Gemma 3 does to float16."""


def test_loud_activations_are_loud() -> None:
    """Sentinel of the tests below."""
    toy = Toy(reduced("12b", 256), torch.float64, loud=LOUD)
    seen: list[float] = []

    def geglu(gu: torch.Tensor, bound: torch.Tensor, columns: int, more: int) -> tuple[torch.Tensor, torch.Tensor]:
        p, c = plain.geglu(gu, bound, columns, more)
        seen.extend([float((p[:, :columns] / c[:, None]).abs().max()), float(c.min())])
        return p, c

    model = toy.stack()
    layer = model.layers[0]
    layer._pieces = layer._pieces._replace(geglu=type("Watched", (), {"geglu": staticmethod(geglu)}))  # type: ignore[arg-type]
    with torch.no_grad():
        model.hidden({"input_ids": torch.tensor([documents(LENGTHS)[0]]), "cu_seq_lens_q": torch.tensor([0, 40])})
    residual = float(toy.embedding.abs().max()) * toy.size.hidden_size**0.5
    assert residual > 8e5 and seen[0] > 65504 and seen[1] < 1, (residual, seen)


def test_loud_activations_change_nothing_in_float64() -> None:
    """Rows are scaled and the norms behind take it out: the same hidden states and gradients as of a model that never scales."""
    ours, theirs = both(Toy(reduced("12b", 256), torch.float64, loud=LOUD))
    assert worst(ours, theirs) <= 1e-5


def scaled(toy: Toy, model: stack.Stack, grad: torch.Tensor, scale: float) -> Answer:
    """As with a loss scale: gradients are multiplied before backward and divided afterwards, in float32."""
    ours = of_ours(toy, model, documents(LENGTHS), grad * scale)
    assert bool(ours.hidden.isfinite().all()) and all(bool(one.isfinite().all()) for one in ours.gradients.values())
    return ours._replace(gradients={name: value / scale for name, value in ours.gradients.items()})


def test_loud_activations_are_finite_in_float16_and_near_the_exact_model() -> None:
    """Behind a residual of 8e5 gradients are as much smaller: the loss scale finds 2^12."""
    toy = Toy(reduced("12b", 256), torch.float16, loud=LOUD)
    grad = gradient(toy.size, LENGTHS)
    ours = scaled(toy, toy.stack(), grad, 2.0**12)
    assert worst(ours, of_transformers(toy, documents(LENGTHS), grad)) <= 1e-2


def test_a_gradient_of_one_in_ten_million_is_not_lost_behind_the_loss_scale() -> None:
    toy = Toy(reduced("1b"), torch.float16)
    grad = gradient(toy.size, LENGTHS) * 1e-7
    ours = scaled(toy, toy.stack(), grad, 2.0**16)
    assert worst(ours, of_transformers(toy, documents(LENGTHS), grad)) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("loud", [Loud(), LOUD], ids=["calm", "loud"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_on_a_card_in_float16_with_the_attention_of_a_t4(name: str, loud: Loud) -> None:
    from trainer.kernels import fused

    toy = Toy(reduced(name, hidden=256, inner=512), torch.float16, "cuda", loud)
    grad = gradient(toy.size, LENGTHS)
    ours = scaled(toy, toy.stack(ops=fused, kind=attention.Turing), grad, 2.0**12 if loud == LOUD else 1.0)
    assert worst(ours, of_transformers(toy, documents(LENGTHS), grad)) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", GEOMETRIES)
def test_on_a_card_in_bfloat16_with_flash_attention(name: str) -> None:
    from trainer.kernels import fused

    toy = Toy(reduced(name, hidden=256, inner=512), torch.bfloat16, "cuda")
    texts, grad = documents(LENGTHS), gradient(toy.size, LENGTHS)
    ours = of_ours(toy, toy.stack(ops=fused, kind=attention.Flash), texts, grad)
    assert worst(ours, of_transformers(toy, texts, grad)) <= 0.1
