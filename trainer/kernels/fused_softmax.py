"""The two softmax passes of fused.py: attention's backward over a band of scores, and the loss with its gradient over the vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softmax_backward_kernel(
    s, dp, lse, delta, first, p, ds, scale, t0, lo, num_rows, num_keys, stride, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = t0 + row // GROUP
    key = lo + at
    place = (head * num_rows + row) * num_keys + at
    inside = at < num_keys
    seen = inside & (key <= token) & (key >= tl.load(first + token))
    number = tl.load(s + place, mask=seen, other=0.0) * scale - tl.load(lse + head * stride + row)
    prob = tl.where(seen, tl.exp(number), 0.0)
    grad = prob * (tl.load(dp + place, mask=seen, other=0.0) - tl.load(delta + head * stride + row)) * scale
    tl.store(p + place, prob.to(p.dtype.element_ty), mask=inside)
    tl.store(ds + place, grad.to(ds.dtype.element_ty), mask=inside)


def softmax_backward(
    s_BRN: Tensor, dp_BRN: Tensor, lse_BR: Tensor, delta_BR: Tensor, first_T: Tensor, scale: float, rows: tuple[int, int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """lse and delta may be slices of longer rows, with equal strides."""
    heads, num_rows, num_keys = s_BRN.shape
    assert lse_BR.stride() == delta_BR.stride() and lse_BR.stride(1) == 1
    p, ds = torch.empty_like(s_BRN, dtype=dtype), torch.empty_like(s_BRN, dtype=dtype)
    t0, lo, group = rows
    softmax_backward_kernel[(num_rows, triton.cdiv(num_keys, 1024), heads)](
        s_BRN, dp_BRN, lse_BR, delta_BR, first_T, p, ds, scale, t0, lo, num_rows, num_keys, lse_BR.stride(0), GROUP=group, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    return p, ds


@triton.jit
def softmax_share_kernel(logits, targets, losses, share, lift, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    most = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):  # every lane keeps a maximum and a sum of its own
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * columns + at, mask=at < columns, other=-float("inf"))
        higher = tl.maximum(most, value)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(most - safe) + tl.exp(value - safe)
        most = higher
    peak = tl.max(most)
    normaliser = peak + tl.log(tl.sum(total * tl.exp(most - peak)))
    target = tl.load(targets + row)
    tl.store(losses + row, normaliser - tl.load(logits + row * columns + target))
    tl.debug_barrier()
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * columns + at, mask=at < columns, other=0.0)
        grad = lift * (tl.exp(value - normaliser) - tl.where(at == target, 1.0, 0.0))
        tl.debug_barrier()  # share lies in the same memory, at half the stride: what is written now has been read by all
        tl.store(share + row * stride + at, grad.to(share.dtype.element_ty), mask=at < columns)


LOSS_ROWS = 256
"""Twice plain.py's, in the same memory: gradients are written over the logits that they come from."""


def softmax_share(logits_NV: Tensor, targets_N: Tensor, lift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A share of 16 bits is a view of the logits' memory; in float32 it has its own."""
    num, columns = logits_NV.shape
    share = torch.empty_like(logits_NV) if dtype == torch.float32 else logits_NV.view(dtype)[:, :columns]
    losses = logits_NV.new_empty(num)
    softmax_share_kernel[(num,)](logits_NV, targets_N, losses, share, lift, columns, share.stride(0), BLOCK=4096, num_warps=16)
    return losses, share
