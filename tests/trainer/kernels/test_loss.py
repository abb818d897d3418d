"""loss: chunks give what torch's cross_entropy gives, value and gradient."""

from __future__ import annotations

import weakref
from types import ModuleType

import pytest
import torch

from trainer.kernels import loss, plain


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


def test_stock_is_torchs_own() -> None:
    hidden, weight, labels = problem()
    torch.testing.assert_close(loss.stock_cross_entropy(hidden, weight, labels), stock(hidden, weight, labels), rtol=0, atol=0)


def test_rows_that_are_known_already_change_nothing() -> None:
    hidden, weight, labels = problem()
    assert torch.equal(
        loss.summed_cross_entropy(hidden, weight, labels, loss.supervised_rows(labels)), loss.summed_cross_entropy(hidden, weight, labels)
    )


def test_no_row_reaches_into_the_next_line() -> None:
    """The last token of a line predicts nothing, whatever the next line begins with."""
    labels = torch.tensor([[-100, 5, -100], [7, -100, 6]])
    assert loss.supervised_rows(labels).tolist() == [0, 4]


def certain() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float16 hidden states of a token whose successor is all but certain, head, labels.

    4,095 others share what is left, about 1e-8 each, less than float16 holds. All rows of the head have a common part, so that
    their sum is as large as the target's own term and of the other sign: lose the others and the gradient is off by its size.
    """
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(4096, 256, generator=generator) / 8 + 0.5).half()
    away = (weight[0].double() - weight.double().mean(dim=0))[None, None]
    return (away * 18 / away.square().sum()).half().repeat(1, 2, 1), weight, torch.tensor([[-100, 0]])


@pytest.mark.parametrize("scale", [2.0**12, 2.0**24])
def test_probabilities_below_float16_are_not_lost(scale: float) -> None:
    """To 2 %: a CPU rounds logits of size 18 to 2^-6. A scale beyond float16 overflows nothing by itself. Sentinel: 30 % without the lift."""
    hidden, weight, labels = certain()
    ours = hidden.clone().requires_grad_()
    (loss.summed_cross_entropy(ours, weight, labels) * scale).backward()  # type: ignore[no-untyped-call]
    exact = hidden.double().requires_grad_()
    stock(exact, weight.double(), labels).backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and exact.grad is not None
    share = torch.softmax(hidden[0, 0].double() @ weight.double().t(), dim=0) - torch.eye(1, 4096)[0]
    for got, low, high in ((ours.grad[0, 0].double() / scale, 0.0, 0.02), (share.half().double() @ weight.double(), 0.2, 1.0)):
        off = (got - exact.grad[0, 0]).abs().max() / exact.grad.abs().max()
        assert low <= off < high


def test_a_chunk_is_gone_before_the_next_one_is_made() -> None:
    """Two chunks' logits at once are 0.27 GB more at Gemma's vocabulary. Sentinel: the last one is alive until the product with it is made."""
    hidden, weight, labels = problem()
    chunks = -(-int((labels[:, 1:] != -100).sum()) // 8)
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(logits: torch.Tensor, targets: torch.Tensor, lift: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        assert not [one for one in seen if one() is not None], "an earlier chunk is still there"
        losses, share = plain.softmax_share(logits, targets, lift, dtype)
        seen.extend((weakref.ref(logits), weakref.ref(share)))
        assert seen[-1]() is not None
        return losses, share

    ops = ModuleType("watched")
    vars(ops).update(LOSS_ROWS=8, softmax_share=watched)
    total = loss.summed_cross_entropy(hidden, weight, labels, ops=ops)
    assert len(seen) == 2 * chunks
    assert total.item() == pytest.approx(loss.summed_cross_entropy(hidden, weight, labels).item(), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_card_it_never_waits_and_holds_one_chunk(dtype: torch.dtype) -> None:
    """Gemma's 262,144 tokens at 1,024 rows: at most 300 MB beside the kept gradient, and float64's gradient within 16 bit."""
    generator = torch.Generator("cuda").manual_seed(3)
    weight = (torch.randn(262_144, 256, generator=generator, device="cuda") / 16).to(dtype)
    hidden = torch.randn(1, 1024, 256, generator=generator, device="cuda").to(dtype).requires_grad_()
    labels = torch.randint(0, 262_144, (1, 1024), generator=generator, device="cuda")
    rows = loss.supervised_rows(labels)
    (loss.summed_cross_entropy(hidden, weight, labels, rows) / 1023).backward()  # type: ignore[no-untyped-call] # cuBLAS wakes up
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = loss.summed_cross_entropy(hidden, weight, labels, rows)
        (total * 2.0**12 / 1023).backward()  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 300e6
    exact = hidden.detach().double().requires_grad_()
    truth = stock(exact, weight.double(), labels)
    (truth * 2.0**12 / 1023).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and exact.grad is not None
    assert total.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (hidden.grad.double() - exact.grad).abs().max() < 8 * torch.finfo(dtype).eps * exact.grad.abs().max()
