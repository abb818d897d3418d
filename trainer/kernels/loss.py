"""Cross-entropy of frozen output embeddings, in chunks of rows, so that the logits of a batch never exist at once.

With z = h W^T and p = softmax(z), the loss of a token y is logsumexp(z) - z_y and its gradient dL/dh = (p - e_y) W. W is
frozen, so both come out of one visit to a chunk: forward keeps dL/dh [N, H] instead of the logits [N, V], and backward is a
multiplication by a scalar. At Gemma's 262,144 tokens a chunk of 128 rows is 134 MB of float32.

TRL's own fused head does the same in Triton, which runs on no CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 128


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = torch.mm(hidden[rows].to(weight.dtype), weight.t()).float()
            at_target = logits.gather(1, targets[rows, None])
            normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (normaliser - at_target).sum()
            if grad is not None:
                share = logits.sub_(normaliser).exp_()
                share.scatter_add_(1, targets[rows, None], torch.full_like(at_target, -1.0))
                grad[rows] = torch.mm(share.to(weight.dtype), weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = ctx.saved_tensors
        return (None if grad is None else grad * grads[0].to(grad.dtype)), None, None


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Sum over supervised tokens of -log p(next token), nats.

    hidden: [B, T, H] after the final norm; weight: [V, H], gets no gradient; labels: [B, T], not shifted: the token at t is
    predicted from position t - 1.
    """
    targets = labels[:, 1:]
    supervised = targets != ignore
    total: Tensor = _SummedCrossEntropy.apply(hidden[:, :-1][supervised], weight.detach(), targets[supervised])
    return total
