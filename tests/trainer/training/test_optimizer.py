"""optimizer: magnitudes never decay, and their state stays in 32 bit."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from trainer.config import Train
from trainer.training import optimizer


def parameters() -> list[tuple[str, Parameter]]:
    torch.manual_seed(0)
    return [
        ("base.weight", Parameter(torch.randn(8, 8), requires_grad=False)),
        ("layer.lora_A.default.weight", Parameter(torch.randn(8, 1024))),
        ("layer.lora_B.default.weight", Parameter(torch.randn(1024, 8))),
        ("layer.lora_magnitude_vector.default.weight", Parameter(torch.rand(8192) + 1)),
    ]


def test_only_matrices_decay_and_only_what_trains_is_there() -> None:
    matrices, magnitudes = optimizer.groups(parameters(), Train(weight_decay=0.1))
    assert (len(matrices["params"]), matrices["weight_decay"]) == (2, 0.1)
    assert (len(magnitudes["params"]), magnitudes["weight_decay"]) == (1, 0.0)


def test_without_dora_there_is_one_group() -> None:
    assert len(optimizer.groups(parameters()[:3], Train())) == 1


def test_a_magnitude_without_gradient_stays_where_it_is() -> None:
    """Sentinel: a matrix under the same step shrinks."""
    named = parameters()
    made = optimizer.build(named, Train(optimizer="adamw32", weight_decay=0.5, learning_rate=0.1))
    before = {name: parameter.detach().clone() for name, parameter in named}
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    after = dict(named)
    assert torch.equal(after["layer.lora_magnitude_vector.default.weight"], before["layer.lora_magnitude_vector.default.weight"])
    assert not torch.equal(after["layer.lora_A.default.weight"], before["layer.lora_A.default.weight"])


def test_the_8_bit_optimizer_keeps_magnitudes_in_32_bit() -> None:
    named = parameters()
    made = optimizer.build(named, Train(optimizer="adamw8bit"))
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    kinds = {name: made.state[parameter]["state1"].dtype for name, parameter in named if parameter.requires_grad}
    assert kinds["layer.lora_A.default.weight"] == torch.uint8
    assert kinds["layer.lora_magnitude_vector.default.weight"] == torch.float32
