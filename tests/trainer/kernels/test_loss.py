"""loss: chunks give what torch's cross_entropy gives, value and gradient."""

from __future__ import annotations

import torch

from trainer.kernels import loss


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, labels with gaps; more supervised tokens than fit one chunk."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 90, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (3, 90), generator=generator)
    labels[torch.rand(3, 90, generator=generator) < 0.3] = -100
    return hidden, weight, labels


def stock(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden[:, :-1] @ weight.t()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def test_value_and_gradient_are_those_of_cross_entropy() -> None:
    hidden, weight, labels = problem()
    assert int((labels[:, 1:] != -100).sum()) > loss.CHUNK_ROWS
    ours = loss.summed_cross_entropy(hidden, weight, labels)
    (ours_grad,) = torch.autograd.grad(ours / 7, hidden)
    theirs = stock(hidden, weight, labels)
    (theirs_grad,) = torch.autograd.grad(theirs / 7, hidden)
    # float32 sums of 180 terms of size 8: 2^-24 * 180 * 8, rounded up
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-6)


def test_unshifted_labels_would_show() -> None:
    """Sentinel: the token at t is predicted from t - 1."""
    hidden, weight, labels = problem()
    shifted_twice = torch.roll(labels, -1, dims=1)
    assert abs((loss.summed_cross_entropy(hidden, weight, labels) - loss.summed_cross_entropy(hidden, weight, shifted_twice)).item()) > 1


def test_no_supervised_token_is_a_zero_that_can_be_differentiated() -> None:
    hidden, weight, labels = problem()
    total = loss.summed_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 0.0 and hidden.grad is not None and not hidden.grad.any()
