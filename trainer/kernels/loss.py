"""Cross-entropy of frozen output embeddings, in chunks of rows, so that the logits of a batch never exist at once.

With z = h W^T and p = softmax(z), the loss of a token y is logsumexp(z) - z_y and its gradient dL/dh = (p - e_y) W. W is
frozen, so both come out of one visit to a chunk: forward keeps dL/dh instead of the logits, and backward is a multiplication
by a scalar. Only rows that bear loss are visited. At Gemma's 262,144 tokens a chunk of 128 rows is 134 MB of float32.

In float16 p ends at 6e-8 while most of a vocabulary lies below, so p - e_y is lifted by 2^10 on its way through the product
(at most 1024, far from 65504), and so is the kept dL/dh; backward takes the lift out again, in float32, together with the
factor that comes from above. That factor may lie beyond float16, too: a loss scale up to 2^24, over the tokens of a step.

Bytes at [B, T, H]: the kept gradient, in hidden's dtype and in place of it the result of backward. Nothing else outlives a chunk.

TRL's own fused head does the same in Triton, which runs on no CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trainer.kernels import plain

CHUNK_ROWS = plain.LOSS_ROWS
IGNORE = -100
"""Label of a position that bears no loss."""
LIFT = 2.0**10
BESIDE = frozenset({"labels", "supervised", "num_tokens"})
"""What a batch holds beside the inputs of the model's forward pass."""

Hidden = Callable[[Mapping[str, Any]], Tensor]
"""From the inputs of a batch to [B, T, H] after the final norm."""
Summed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""summed_cross_entropy, or another with its arguments."""


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, supervised: Tensor, ops: ModuleType) -> Tensor:
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.flatten().index_select(0, supervised + 1)
        lift = LIFT if weight.dtype == torch.float16 else 1.0
        grad = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(supervised), ops.LOSS_ROWS):
            places, wanted = (some[start : start + ops.LOSS_ROWS] for some in (supervised, targets))
            logits = _product(rows.index_select(0, places).to(weight.dtype), weight.t())
            losses, share = ops.softmax_share(logits, wanted, lift, weight.dtype)
            total += losses.sum()
            if grad is not None:
                grad.index_copy_(0, places, _product(share, weight).to(grad.dtype))
            del logits, share  # the next chunk's would else stand beside them: 0.27 GB more at Gemma's vocabulary
        ctx.grad, ctx.lift, ctx.shape = grad, lift, hidden.shape
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad, ctx.grad = ctx.grad, None
        assert grad is not None, "backward runs once: it turns what forward kept into its result"
        factor = grads[0].float() / ctx.lift
        for part in grad.split(8 * CHUNK_ROWS):
            part.copy_(part.float() * factor)
        return grad.view(ctx.shape), None, None, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Float32 result; sums in float32, whatever the operands are. On CPUs a 16-bit product is rounded to 16 bit first."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def supervised_rows(labels: Tensor) -> Tensor:
    """[N] int64: positions b * T + t, ascending, whose next token bears loss. labels: [B, T]. On a card this waits for it."""
    bears = torch.zeros_like(labels, dtype=torch.bool)
    bears[:, :-1] = labels[:, 1:] != IGNORE
    return bears.flatten().nonzero().flatten()


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, supervised: Tensor | None = None, *, ops: ModuleType = plain
) -> Tensor:
    """Sum over supervised tokens of -log p(next token), nats; float32.

    hidden: [B, T, H] after the final norm; weight: [V, H], gets no gradient; labels: [B, T], not shifted: the token at t is
    predicted from position t - 1; supervised: supervised_rows(labels), where they are known. ops: plain.py or fused.py.
    """
    places = supervised_rows(labels) if supervised is None else supervised
    total: Tensor = _SummedCrossEntropy.apply(hidden, weight.detach(), labels, places, ops)
    return total


def stock_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, supervised: Tensor | None = None) -> Tensor:
    """The same by torch alone, with all [B, T, V] logits in float32 at once."""
    logits = (hidden[:, :-1].to(weight.dtype) @ weight.detach().t()).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model's forward pass reads."""
    return {name: value for name, value in batch.items() if name not in BESIDE}


def of_batch(batch: Mapping[str, Any], hidden: Hidden, weight: Tensor, summed: Summed = summed_cross_entropy) -> Tensor:
    """Summed loss of a batch that lies on the weight's device."""
    return summed(hidden(inputs(batch)), weight, batch["labels"], batch["supervised"])
