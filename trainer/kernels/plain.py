"""What fused.py does in Triton, said in plain torch: the specification, the CPU's way, and what a piece that is "stock" runs.

Every function stands in both modules under the same name with the same arguments. Arithmetic is float32 (float64 stays) whatever the
inputs are. `more` asks for so many further columns behind a result, unwritten: dora.py puts X A^T and P there.
Legend of suffixes: T tokens, H hidden, I intermediate, K heads of keys and
values, G query heads of each, D width of a head, O rows of a weight.

RMSNorm here is Gemma's, y = x * rstd * (1 + w) with rstd = (mean(x^2) + eps)^(-1/2) (arXiv 1910.07467; Gemma 3 report, arXiv
2503.19786, section 2). Where its input was multiplied by c beforehand, eps is multiplied by c^2, and y is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.kernels.nf4 import Nf4

SAFE = 32768.0
"""Half of what float16 holds: no product is scaled to more than this."""
LOSS_ROWS = 128
"""Rows of logits at a time: at Gemma's 262,208 tokens 134 MB of float32, and half of that again in 16 bits."""


def dequantize(weight: Nf4, gain_O: Tensor | None, out_OI: Tensor) -> None:
    """out = gain * W, NF4 to out's dtype: gain goes into the block's scale, so that there is one rounding in all."""
    pairs = torch.stack((weight.codes.view(-1) >> 4, weight.codes.view(-1) & 15), dim=1).view(-1, 64).long()
    scale = weight.scales()
    if gain_O is not None:
        scale = scale.to(gain_O.dtype).view(len(gain_O), -1) * gain_O[:, None]
    out_OI.copy_((weight.table[pairs] * scale.view(-1, 1)).view(out_OI.shape))


def rms(x_TH: Tensor, w_H: Tensor, eps: float, dtype: torch.dtype, more: int = 0) -> Tensor:
    """Norm of the residual [T, H], in dtype."""
    return _widened(x_TH * _rstd(x_TH, eps)[:, None] * (1 + w_H.to(x_TH.dtype)), dtype, more)


def rms_backward_(dy_TH: Tensor, x_TH: Tensor, w_H: Tensor, eps: float, dx_TH: Tensor) -> None:
    """dx += gradient of the norm's input; dx is the residual's own gradient. rstd costs nothing beside the row, so it is made again."""
    dx_TH += _norm_backward(dy_TH.to(x_TH.dtype), x_TH, w_H, _rstd(x_TH, eps))


def rms_residual(a_TH: Tensor, x_TH: Tensor, w_H: Tensor, eps: float, c_T: Tensor) -> Tensor:
    """x + norm(a): the residual after a branch whose output a was scaled by c."""
    wide = a_TH.to(x_TH.dtype)
    return x_TH + wide * _rstd(wide, eps * c_T.square())[:, None] * (1 + w_H.to(x_TH.dtype))


def rms_residual_backward(dx_TH: Tensor, a_TH: Tensor, w_H: Tensor, eps: float, c_T: Tensor, more: int = 0) -> Tensor:
    """Gradient of the scaled branch's output a, in a's dtype."""
    wide = a_TH.to(dx_TH.dtype)
    return _widened(_norm_backward(dx_TH, wide, w_H, _rstd(wide, eps * c_T.square())), a_TH.dtype, more)


def turn(
    qkv_TO: Tensor, q_w_D: Tensor, k_w_D: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [K, T, G, D], k and v [K, T, D] from the projections' output [T, (K G + 2 K) D]: RMSNorm over a head of q and k, then rotation.

    cos, sin: [T, D / 2] float32 (RoFormer, arXiv 2104.09864, section 3.4.2, in the half-split form). heads: (K, G).
    """
    q, k, v = _heads(qkv_TO, heads)
    turned = (_turned(q, q_w_D, cos_TD, sin_TD, eps), _turned(k, k_w_D, cos_TD, sin_TD, eps)[:, :, 0], v[:, :, 0])
    return tuple(part.to(qkv_TO.dtype).contiguous() for part in turned)  # type: ignore[return-value]


def turn_backward(
    dq_KTGD: Tensor,
    dk_KTD: Tensor,
    dv_KTD: Tensor,
    qkv_TO: Tensor,
    q_w_D: Tensor,
    k_w_D: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    heads: tuple[int, int],
    eps: float,
    more: int = 0,
) -> Tensor:
    """Gradient [T, O] of the projections' output, in its dtype."""
    q, k, _ = _heads(qkv_TO, heads)
    parts = [
        _turned_backward(_wide(dq_KTGD), q, q_w_D, cos_TD, sin_TD, eps),
        _turned_backward(_wide(dk_KTD)[:, :, None], k, k_w_D, cos_TD, sin_TD, eps),
        _wide(dv_KTD)[:, :, None],
    ]
    tokens = len(qkv_TO)
    return _widened(torch.cat([part.permute(1, 0, 2, 3).reshape(tokens, -1) for part in parts], 1), qkv_TO.dtype, more)


def merge(o_KTGD: Tensor, bound: Tensor, more: int = 0) -> tuple[Tensor, Tensor]:
    """Attention's output as the next product's input c * o [T, K G D], and c [T].

    bound: scalar, the largest row norm of that product's matrix: |row . x| <= bound |x| (Cauchy-Schwarz). c is 1 or the power of
    two that keeps this below SAFE, so that float16 cannot overflow; the norm behind the product takes it out again, exactly.
    """
    o_TO = _wide(o_KTGD).permute(1, 0, 2, 3).reshape(o_KTGD.shape[1], -1)
    c = _c(o_TO.square().sum(1), bound)
    return _widened(o_TO * c[:, None], o_KTGD.dtype, more), c


def geglu(gu_TI: Tensor, bound: Tensor, columns: int, more: int = 0) -> tuple[Tensor, Tensor]:
    """c * gelu(gate) * up [T, I] from both side by side [T, 2 I (and more)], gelu by tanh (arXiv 1606.08415, section 2); c as in merge."""
    gate, up = _wide(gu_TI[:, : 2 * columns]).chunk(2, 1)
    product = gate * torch.sigmoid(2 * _inner(gate)) * up
    c = _c(product.square().sum(1), bound)
    return _widened(product * c[:, None], gu_TI.dtype, more), c


def geglu_backward_(dp_TI: Tensor, gu_TI: Tensor, c_T: Tensor) -> Tensor:
    """Gradient of gate and up in their own place; returns column sums [2 I] of gradient times value, for DoRA's m."""
    values = _wide(gu_TI[:, : 2 * dp_TI.shape[1]])
    gate, up = values.chunk(2, 1)
    dp = _wide(dp_TI) * c_T[:, None]
    share = torch.sigmoid(2 * _inner(gate))
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate.square())
    d_gate, d_up = dp * up * (share + gate * share * (1 - share) * slope), dp * gate * share
    both = torch.cat((d_gate, d_up), 1)
    sums = (both * values).sum(0)
    gu_TI[:, : both.shape[1]].copy_(both)
    return sums


def column_dot(dy_TO: Tensor, y_TO: Tensor) -> Tensor:
    """sum over tokens of dy * y, [O] float32; dy may have more columns."""
    return (_wide(dy_TO[:, : y_TO.shape[1]]) * _wide(y_TO)).sum(0)


def pack(x_TH: Tensor, out_TH: Tensor) -> Tensor:
    """Rows in 16 bits: out = x / scale with a power of two a row that brings its largest value to 16384..32768; returns scale [T]."""
    largest = x_TH.abs().amax(1).clamp_min(1e-30)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - 14)
    out_TH.copy_(x_TH / scale[:, None])
    return scale


def unpack(packed_TH: Tensor, scale_T: Tensor) -> Tensor:
    return _wide(packed_TH) * scale_T[:, None]


def row_norms(squares_O: Tensor, wa_OR: Tensor, ba_OR: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """DoRA's n [O] from |W|^2, W A^T, B (A A^T) and B: see dora.py."""
    return (squares_O + (b_OR * (2 * scale * wa_OR + scale**2 * ba_OR)).sum(1)).clamp_min(0).sqrt()


def softmax_share(logits_NV: Tensor, targets_N: Tensor, lift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses [N] float32, and lift * (softmax - one-hot) [N, V] in dtype; logits may be overwritten."""
    at_target = logits_NV.gather(1, targets_N[:, None])
    normaliser = torch.logsumexp(logits_NV, dim=1, keepdim=True)
    share = logits_NV.sub_(normaliser).exp_()
    share.scatter_add_(1, targets_N[:, None], torch.full_like(at_target, -1.0))
    return (normaliser - at_target)[:, 0], share.mul_(lift).to(dtype)


def regroup(do_TO: Tensor, o_TO: Tensor, c_T: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """From gradient and value of the scaled attention output [T, K G D (o: and more)]: c * gradient as [K, T, G, D], and delta
    [K, T, G], the row sums of gradient times value that softmax's backward needs (arXiv 2307.08691, section 2.3.2; c cancels)."""
    kv, group = heads
    shape = (len(do_TO), kv, group, -1)
    delta = (_wide(do_TO) * _wide(o_TO[:, : do_TO.shape[1]])).view(shape).sum(3).permute(1, 0, 2).contiguous()
    grad = (_wide(do_TO) * c_T[:, None]).to(do_TO.dtype).view(shape)
    return grad.permute(1, 0, 2, 3).contiguous(), delta


def softmax_backward(
    s_BRN: Tensor,
    dp_BRN: Tensor,
    lse_BR: Tensor,
    delta_BR: Tensor,
    first_T: Tensor,
    scale: float,
    rows: tuple[int, int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """P = exp(S scale - lse) under the mask, and dS = P (dP - delta) scale, both in dtype.

    rows: (first token of the block, first key, query heads of a group): row r is token t0 + r // G, column n is key lo + n; token i
    sees keys first[i] .. i.
    """
    t0, lo, group = rows
    token = t0 + torch.arange(s_BRN.shape[1], device=s_BRN.device) // group
    key = lo + torch.arange(s_BRN.shape[2], device=s_BRN.device)
    seen = (key[None] <= token[:, None]) & (key[None] >= first_T[token][:, None])
    p = torch.where(seen, torch.exp(s_BRN * scale - lse_BR[:, :, None]), 0)
    return p.to(dtype), (p * (dp_BRN - delta_BR[:, :, None]) * scale).to(dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _widened(x: Tensor, dtype: torch.dtype, more: int) -> Tensor:
    """x in dtype with `more` columns behind it that nobody has written yet."""
    if not more:
        return x.to(dtype)
    out = x.new_empty(len(x), x.shape[1] + more, dtype=dtype)
    out[:, : x.shape[1]] = x
    return out


def _rstd(x: Tensor, eps: float | Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(-1) + eps)


def _norm_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """Over the last axis: rstd (gw - x rstd^2 mean(gw x)), gw = dy (1 + w)."""
    gw, rstd = dy * (1 + w.to(x.dtype)), rstd[..., None]
    return rstd * (gw - x * rstd.square() * (gw * x).mean(-1, keepdim=True))


def _heads(qkv_TO: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q [K, T, G, D], k and v [K, T, 1, D], wide views."""
    kv, group = heads
    split = _wide(qkv_TO).view(len(qkv_TO), kv * (group + 2), -1)
    q, k, v = split.split((kv * group, kv, kv), 1)
    parts = (q.unflatten(1, (kv, group)), k.unflatten(1, (kv, 1)), v.unflatten(1, (kv, 1)))
    return parts[0].permute(1, 0, 2, 3), parts[1].permute(1, 0, 2, 3), parts[2].permute(1, 0, 2, 3)


def _turned(x_KTGD: Tensor, w_D: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float) -> Tensor:
    normed = x_KTGD * _rstd(x_KTGD, eps)[..., None] * (1 + w_D.to(x_KTGD.dtype))
    return _rotate(normed, cos_TD, sin_TD)


def _rotate(x_KTGD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    left, right = x_KTGD.chunk(2, -1)
    cos, sin = cos_TD[None, :, None], sin_TD[None, :, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def _turned_backward(dy: Tensor, x: Tensor, w_D: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float) -> Tensor:
    return _norm_backward(_rotate(dy.to(x.dtype), cos_TD, -sin_TD), x, w_D, _rstd(x, eps))


def _inner(gate: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)


def _c(squares_T: Tensor, bound: Tensor) -> Tensor:
    most = SAFE / (bound * squares_T.sqrt()).clamp_min(1e-30)
    return torch.exp2(torch.floor(torch.log2(most))).clamp_max(1.0)
