"""scaling: overflows cost one step and nothing else, and what is small is not lost."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from trainer.backends.bitsandbytes import adamw8bit
from trainer.errors import StoppedError
from trainer.training import scaling
from trainer.training.scaling import Stepper


class Calls:
    """How often the hook was called, and the weight it saw last."""

    def __init__(self, weight: Parameter) -> None:
        self.number, self.seen, self._weight = 0, weight.detach().clone(), weight

    def __call__(self) -> None:
        self.number += 1
        self.seen.copy_(self._weight)


def weights() -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(4, 3)), Parameter(torch.randn(5))]


def stepper(parameters: list[Parameter], *, scaled: bool, max_norm: float = 1e9, after: Any = lambda: None) -> Stepper:
    inner = torch.optim.AdamW([{"params": [one], "weight_decay": 0.0} for one in parameters], lr=0.1)
    return Stepper(inner, max_norm=max_norm, after=after, scaled=scaled)


def backward(parameters: list[Parameter], value: float, scale: float) -> None:
    for one in parameters:
        one.grad = torch.full_like(one, value) * scale


def everything(made: Stepper) -> Iterator[torch.Tensor]:
    """Weights and optimizer state, in order, as copies."""
    for group in made.param_groups:
        for one in group["params"]:
            yield one.detach().clone()
            yield from (value.clone() for value in made.state[one].values())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(bad: float) -> None:
    parameters = weights()
    made = stepper(parameters, scaled=True)
    backward(parameters, 0.5, made.scale)
    made.step()
    before, scale = list(everything(made)), made.scale
    backward(parameters, 0.5, scale)
    assert parameters[1].grad is not None
    parameters[1].grad[2] = bad
    made.step()
    assert len(before) == 8 and all(torch.equal(one, other) for one, other in zip(before, everything(made), strict=True))
    assert (made.scale, made.skipped, made.grad_norm) == (scale / 2, 1, None)


def test_float16_finds_its_scale_by_itself() -> None:
    """A real overflow: 100 * 2^12 is beyond float16, and after three halvings it fits."""
    parameters = weights()
    made = stepper(parameters, scaled=True)
    for _ in range(5):
        for one in parameters:
            one.grad = (torch.full_like(one, 100.0).half() * made.scale).float()
        made.step()
    assert (made.scale, made.skipped) == (2.0**9, 3)
    assert made.grad_norm == pytest.approx(100 * 17**0.5)


def test_a_run_of_good_steps_doubles_the_scale_up_to_a_bound() -> None:
    parameters = weights()
    made = stepper(parameters, scaled=True)
    course = []
    for step in range(15 * scaling.GOOD_STEPS):
        backward(parameters, float("inf") if step == 100 else 0.1, 1.0)
        made.step()
        course.append(made.scale)
    assert course[99] == 2.0**12 and course[100] == 2.0**11
    assert course[299] == 2.0**11 and course[300] == 2.0**12, "the run begins anew after an overflow"
    assert course[-1] == max(course) == scaling.MOST


def test_without_float16_the_scale_is_one_for_ever() -> None:
    parameters = weights()
    made = stepper(parameters, scaled=False)
    for _ in range(scaling.GOOD_STEPS + 1):
        backward(parameters, 0.1, 1.0)
        made.step()
    assert made.scale == 1.0


def test_without_float16_a_gradient_that_is_no_number_ends_the_training() -> None:
    parameters = weights()
    made = stepper(parameters, scaled=False)
    backward(parameters, 1.0, 1.0)
    made.step()
    before = list(everything(made))
    backward(parameters, float("nan"), 1.0)
    with pytest.raises(StoppedError, match=r"gradient's norm is no number after step 1;.*learning_rate"):
        made.step()
    assert all(torch.equal(one, other) for one, other in zip(before, everything(made), strict=True))


def test_what_no_scale_mends_ends_the_training() -> None:
    parameters = weights()
    made = stepper(parameters, scaled=True)
    with pytest.raises(StoppedError, match="no number after step 22"):
        for _ in range(100):
            backward(parameters, float("nan"), 1.0)
            made.step()
    assert made.scale == scaling.LEAST / 2 and made.skipped == 23


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_of_1e_7_survive_float16_where_they_are_scaled(scaled: bool) -> None:
    """Sentinel: without a scale their values are off by a tenth and more, as float16's last steps are 6e-8 wide."""
    parameter = Parameter(torch.zeros(1))
    made = Stepper(torch.optim.SGD([parameter], lr=1.0), max_norm=1e9, after=lambda: None, scaled=scaled)
    parameter.grad = (torch.full((1,), 1e-7) * made.scale).half().float()
    made.step()
    off = abs(-parameter.item() / 1e-7 - 1)
    assert off < 2.0**-10 if scaled else off > 0.1


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_the_clip_is_torchs_to_the_last_bit(scale: float) -> None:
    torch.manual_seed(1)
    ours, theirs = weights(), weights()
    made = Stepper(torch.optim.SGD(ours, lr=1.0), max_norm=0.3, after=lambda: None, scaled=scale != 1)
    gradients = [torch.randn_like(one) for one in ours]
    for one, other, gradient in zip(ours, theirs, gradients, strict=True):
        one.grad, other.grad = gradient * scale, gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.3)
    made.step()
    assert made.scale == scale and made.grad_norm == norm.item() > 0.3
    assert all(
        torch.equal(one.grad, other.grad)
        for one, other in zip(ours, theirs, strict=True)
        if one.grad is not None and other.grad is not None
    )


def test_the_hook_sees_the_new_weights_after_real_steps_only() -> None:
    parameters = weights()
    hook = Calls(parameters[0])
    made = stepper(parameters, scaled=True, after=hook)
    for value, calls in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        backward(parameters, value, made.scale)
        made.step()
        assert hook.number == calls
        assert torch.equal(hook.seen, parameters[0].detach())


def test_gradients_that_wait_elsewhere_are_gathered_first() -> None:
    parameters = weights()
    inner = torch.optim.SGD(parameters, lr=1.0)
    made = Stepper(inner, max_norm=1e9, after=lambda: None, scaled=False, gather=lambda: backward(parameters, 1.0, 1.0))
    before = parameters[0].detach().clone()
    made.step()
    torch.testing.assert_close(parameters[0].detach(), before - 1)


@pytest.mark.parametrize("kind", ["adamw32", "adamw8bit"])
def test_its_state_comes_back_from_a_file(kind: str) -> None:
    def new(parameters: list[Parameter]) -> Stepper:
        inner = torch.optim.AdamW(parameters, lr=0.1) if kind == "adamw32" else adamw8bit([{"params": parameters, "lr": 0.1}])
        return Stepper(inner, max_norm=1.0, after=lambda: None, scaled=True)

    parameters = [Parameter(torch.randn(8, 1024))]
    first = new(parameters)
    for value in (1.0, float("inf"), 0.5):
        backward(parameters, value, 1.0)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    copies = [Parameter(one.detach().clone()) for one in parameters]
    second = new(copies)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.scale, second.skipped) == (2.0**11, 1)
    for made, owned in ((first, parameters), (second, copies)):
        for _ in range(scaling.GOOD_STEPS - 1):
            backward(owned, 0.25, 1.0)
            made.step()
    assert torch.equal(parameters[0], copies[0])
    assert first.scale == second.scale == 2.0**12, "how many steps were good so far came back, too"


def test_a_schedule_drives_the_optimizer_inside() -> None:
    parameters = weights()
    made = stepper(parameters, scaled=False)
    made.load_state_dict(made.state_dict())  # accelerate does so, and inner makes new groups of it
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.0 if step else 1.0)
    for moves in (True, False):
        before = parameters[0].detach().clone()
        backward(parameters, 1.0, 1.0)
        made.step()
        schedule.step()
        made.zero_grad()
        assert torch.equal(before, parameters[0].detach()) is not moves
        assert all(one.grad is None for one in parameters)


@pytest.mark.gpu
def test_on_a_card_a_step_waits_once() -> None:
    parameters = [Parameter(torch.randn(64, 64, device="cuda")) for _ in range(3)]
    made = Stepper(torch.optim.AdamW(parameters), max_norm=1.0, after=lambda: None, scaled=True)
    for value in (1.0, 2.0):
        backward(parameters, value, made.scale)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                made.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in waits if "synchroniz" in str(one.message)]) == 1
    assert made.grad_norm == pytest.approx(2 * (3 * 64 * 64) ** 0.5)
