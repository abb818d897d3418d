"""The functions of plain.py as Triton kernels: elementwise work and reductions only.

On a T4 (sm_75) `tl.dot` becomes multiplications on CUDA cores, so matrix products are cuBLAS' and no kernel here holds one; each
stays within 64 KiB of shared memory (tests/trainer/kernels/test_targets.py compiles all of them for sm_75, sm_80 and sm_90 without a card).
Sums over a column are written as one partial sum a block of rows and added afterwards, in the same order every time: no atomics, so
that a resumed run repeats itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels import fused_softmax
from trainer.kernels.fused_softmax import LOSS_ROWS, softmax_backward, softmax_share
from trainer.kernels.nf4 import Nf4

__all__ = [
    "LOSS_ROWS", "column_dot", "dequantize", "geglu", "geglu_backward_", "kernels", "merge", "pack", "regroup", "rms", "rms_backward_",
    "rms_residual", "rms_residual_backward", "row_norms", "softmax_backward", "softmax_share", "turn", "turn_backward", "unpack",
]  # fmt: skip

_ROWS = 64
"""Rows of a partial column sum."""


@triton.jit
def _pow2_floor(x):
    """The largest power of two <= x, exactly: the exponent's bits alone. x > 0 and normal."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _row_scale(squares, bound):
    norm = tl.maximum(bound * tl.sqrt(squares), 1e-30)
    return tl.minimum(_pow2_floor(32768.0 / norm), 1.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def dequantize_kernel(
    codes, absmax, table, nested_table, nested_scales, offset, gain, out, num_bytes, columns, stride,
    NESTED: tl.constexpr, GAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_bytes
    pair = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    block = at // 32  # 64 weights are 32 bytes
    if NESTED:
        number = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(nested_table + number) * tl.load(nested_scales + block // 256, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    if GAIN:
        scale = scale * tl.load(gain + at * 2 // columns, mask=inside, other=0.0)
    high = tl.load(table + (pair >> 4)) * scale
    low = tl.load(table + (pair & 15)) * scale
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    to = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    row = to // columns
    tl.store(out + row * stride + (to - row * columns), values, mask=to < 2 * num_bytes)


def dequantize(weight: Nf4, gain_O: Tensor | None, out_OI: Tensor) -> None:
    assert out_OI.stride(1) == 1 and out_OI.shape == weight.shape
    num, nested = weight.codes.numel(), weight.nested
    table, scales, offset = nested or (weight.table, weight.table, weight.table)
    gain = weight.table if gain_O is None else gain_O
    dequantize_kernel[(triton.cdiv(num, 1024),)](
        weight.codes, weight.absmax, weight.table, table, scales, offset, gain, out_OI, num, weight.shape[1], out_OI.stride(0),
        NESTED=nested is not None, GAIN=gain_O is not None, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def rms_kernel(x, w, y, columns, stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(x + row * columns + at, mask=inside, other=0.0)
    r = 1.0 / tl.sqrt(tl.sum(value * value) / columns + eps)
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * stride + at, (value * r * (1.0 + weight)).to(y.dtype.element_ty), mask=inside)


def rms(x_TH: Tensor, w_H: Tensor, eps: float, dtype: torch.dtype, more: int = 0) -> Tensor:
    y = x_TH.new_empty(len(x_TH), x_TH.shape[1] + more, dtype=dtype)
    rms_kernel[(len(x_TH),)](x_TH, w_H, y, x_TH.shape[1], y.shape[1], eps, BLOCK=triton.next_power_of_2(x_TH.shape[1]), num_warps=8)
    return y


@triton.jit
def rms_backward_kernel(dy, x, w, dx, columns, stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(x + row * columns + at, mask=inside, other=0.0)
    r = 1.0 / tl.sqrt(tl.sum(value * value) / columns + eps)
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    gw = tl.load(dy + row * stride + at, mask=inside, other=0.0).to(tl.float32) * (1.0 + weight)
    dot = tl.sum(gw * (value * r)) / columns
    before = tl.load(dx + row * columns + at, mask=inside, other=0.0)
    tl.store(dx + row * columns + at, before + r * (gw - value * r * dot), mask=inside)


def rms_backward_(dy_TH: Tensor, x_TH: Tensor, w_H: Tensor, eps: float, dx_TH: Tensor) -> None:
    columns = x_TH.shape[1]
    rms_backward_kernel[(len(x_TH),)](
        dy_TH, x_TH, w_H, dx_TH, columns, dy_TH.stride(0), eps, BLOCK=triton.next_power_of_2(columns), num_warps=8
    )


@triton.jit
def rms_residual_kernel(a, x, w, c, out, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(a + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(c + row)
    r = 1.0 / tl.sqrt(tl.sum(value * value) / columns + eps * scale * scale)
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(x + row * columns + at, mask=inside, other=0.0)
    tl.store(out + row * columns + at, before + value * r * (1.0 + weight), mask=inside)


def rms_residual(a_TH: Tensor, x_TH: Tensor, w_H: Tensor, eps: float, c_T: Tensor) -> Tensor:
    out, columns = torch.empty_like(x_TH), x_TH.shape[1]
    rms_residual_kernel[(len(x_TH),)](a_TH, x_TH, w_H, c_T, out, columns, eps, BLOCK=triton.next_power_of_2(columns), num_warps=8)
    return out


@triton.jit
def rms_residual_backward_kernel(dx, a, w, c, da, columns, stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(a + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(c + row)
    r = 1.0 / tl.sqrt(tl.sum(value * value) / columns + eps * scale * scale)
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    gw = tl.load(dx + row * columns + at, mask=inside, other=0.0) * (1.0 + weight)
    dot = tl.sum(gw * (value * r)) / columns
    tl.store(da + row * stride + at, (r * (gw - value * r * dot)).to(da.dtype.element_ty), mask=inside)


def rms_residual_backward(dx_TH: Tensor, a_TH: Tensor, w_H: Tensor, eps: float, c_T: Tensor, more: int = 0) -> Tensor:
    tokens, columns = a_TH.shape
    da = a_TH.new_empty(tokens, columns + more)
    rms_residual_backward_kernel[(tokens,)](
        dx_TH, a_TH, w_H, c_T, da, columns, columns + more, eps, BLOCK=triton.next_power_of_2(columns), num_warps=8
    )
    return da


@triton.jit
def turn_kernel(qkv, q_w, k_w, cos, sin, q, k, v, tokens, eps, KV: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, HALF)
    source = qkv + row * (KV * (GROUP + 2) * 2 * HALF) + head * 2 * HALF + at
    if head >= KV * (GROUP + 1):  # v only moves
        to_v = v + ((head - KV * (GROUP + 1)) * tokens + row) * 2 * HALF + at
        tl.store(to_v, tl.load(source))
        tl.store(to_v + HALF, tl.load(source + HALF))
    else:
        left, right = tl.load(source).to(tl.float32), tl.load(source + HALF).to(tl.float32)
        r = 1.0 / tl.sqrt((tl.sum(left * left) + tl.sum(right * right)) / (2 * HALF) + eps)
        is_query = head < KV * GROUP
        w = q_w if is_query else k_w
        left = left * r * (1.0 + tl.load(w + at).to(tl.float32))
        right = right * r * (1.0 + tl.load(w + HALF + at).to(tl.float32))
        c, s = tl.load(cos + row * HALF + at), tl.load(sin + row * HALF + at)
        to_q = ((head // GROUP * tokens + row) * GROUP + head % GROUP) * 2 * HALF
        to_k = ((head - KV * GROUP) * tokens + row) * 2 * HALF
        target = q + to_q if is_query else k + to_k
        tl.store(target + at, (left * c - right * s).to(q.dtype.element_ty))
        tl.store(target + HALF + at, (right * c + left * s).to(q.dtype.element_ty))


def turn(
    qkv_TO: Tensor, q_w_D: Tensor, k_w_D: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (kv, group), tokens = heads, len(qkv_TO)
    half = cos_TD.shape[1]
    assert qkv_TO.is_contiguous()
    q, k, v = qkv_TO.new_empty(kv, tokens, group, 2 * half), qkv_TO.new_empty(kv, tokens, 2 * half), qkv_TO.new_empty(kv, tokens, 2 * half)
    turn_kernel[(tokens, kv * (group + 2))](
        qkv_TO, q_w_D, k_w_D, cos_TD, sin_TD, q, k, v, tokens, eps, KV=kv, GROUP=group, HALF=half, num_warps=1
    )
    return q, k, v


@triton.jit
def turn_backward_kernel(
    dq, dk, dv, qkv, q_w, k_w, cos, sin, out, tokens, stride, eps, KV: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, HALF)
    to = row * stride + head * 2 * HALF + at
    place = row * (KV * (GROUP + 2) * 2 * HALF) + head * 2 * HALF + at
    if head >= KV * (GROUP + 1):  # v: nothing but the way back
        source = dv + ((head - KV * (GROUP + 1)) * tokens + row) * 2 * HALF + at
        tl.store(out + to, tl.load(source).to(out.dtype.element_ty))
        tl.store(out + to + HALF, tl.load(source + HALF).to(out.dtype.element_ty))
    else:
        if head < KV * GROUP:
            source = dq + ((head // GROUP * tokens + row) * GROUP + head % GROUP) * 2 * HALF + at
            d_left, d_right = tl.load(source).to(tl.float32), tl.load(source + HALF).to(tl.float32)
            w_left, w_right = tl.load(q_w + at).to(tl.float32), tl.load(q_w + HALF + at).to(tl.float32)
        else:
            source_k = dk + ((head - KV * GROUP) * tokens + row) * 2 * HALF + at
            d_left, d_right = tl.load(source_k).to(tl.float32), tl.load(source_k + HALF).to(tl.float32)
            w_left, w_right = tl.load(k_w + at).to(tl.float32), tl.load(k_w + HALF + at).to(tl.float32)
        c, s = tl.load(cos + row * HALF + at), tl.load(sin + row * HALF + at)
        gw_left, gw_right = (d_left * c + d_right * s) * (1.0 + w_left), (d_right * c - d_left * s) * (1.0 + w_right)
        left, right = tl.load(qkv + place).to(tl.float32), tl.load(qkv + place + HALF).to(tl.float32)
        r = 1.0 / tl.sqrt((tl.sum(left * left) + tl.sum(right * right)) / (2 * HALF) + eps)
        dot = (tl.sum(gw_left * left) + tl.sum(gw_right * right)) * r / (2 * HALF)
        tl.store(out + to, (r * (gw_left - left * r * dot)).to(out.dtype.element_ty))
        tl.store(out + to + HALF, (r * (gw_right - right * r * dot)).to(out.dtype.element_ty))


def turn_backward(
    dq_KTGD: Tensor, dk_KTD: Tensor, dv_KTD: Tensor, qkv_TO: Tensor, q_w_D: Tensor, k_w_D: Tensor,
    cos_TD: Tensor, sin_TD: Tensor, heads: tuple[int, int], eps: float, more: int = 0,
) -> Tensor:  # fmt: skip
    (kv, group), tokens = heads, len(qkv_TO)
    out = qkv_TO.new_empty(tokens, qkv_TO.shape[1] + more)
    turn_backward_kernel[(tokens, kv * (group + 2))](
        dq_KTGD, dk_KTD, dv_KTD, qkv_TO, q_w_D, k_w_D, cos_TD, sin_TD, out, tokens, out.shape[1], eps,
        KV=kv, GROUP=group, HALF=cos_TD.shape[1], num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def merge_kernel(
    o, bound, out, c, stride, kv_stride, token_stride, group_stride, COLUMNS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    head = at // WIDE
    place = o + row * token_stride + (head // GROUP).to(tl.int64) * kv_stride + head % GROUP * group_stride + at % WIDE
    value = tl.load(place, mask=at < COLUMNS, other=0.0).to(tl.float32)
    scale = _row_scale(tl.sum(value * value), tl.load(bound))
    tl.store(out + row * stride + at, (value * scale).to(out.dtype.element_ty), mask=at < COLUMNS)
    tl.store(c + row, scale)


def merge(o_KTGD: Tensor, bound: Tensor, more: int = 0) -> tuple[Tensor, Tensor]:
    kv, tokens, group, wide = o_KTGD.shape
    assert o_KTGD.stride(3) == 1
    columns = kv * group * wide
    out, c = o_KTGD.new_empty(tokens, columns + more), o_KTGD.new_empty(tokens, dtype=torch.float32)
    merge_kernel[(tokens,)](
        o_KTGD, bound, out, c, columns + more, *o_KTGD.stride()[:3],
        COLUMNS=columns, GROUP=group, WIDE=wide, BLOCK=triton.next_power_of_2(columns), num_warps=8,
    )  # fmt: skip
    return out, c


@triton.jit
def geglu_kernel(gu, bound, p, c, columns, gu_stride, p_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(gu + row * gu_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gu + row * gu_stride + columns + at, mask=inside, other=0.0).to(tl.float32)
    value = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    scale = _row_scale(tl.sum(value * value), tl.load(bound))
    tl.store(c + row, scale)
    tl.store(p + row * p_stride + at, (value * scale).to(p.dtype.element_ty), mask=inside)


def geglu(gu_TI: Tensor, bound: Tensor, columns: int, more: int = 0) -> tuple[Tensor, Tensor]:
    """A row stays in registers between its norm and its scaling: 32 values a thread at 12B's 15,360 columns."""
    tokens = len(gu_TI)
    p, c = gu_TI.new_empty(tokens, columns + more), gu_TI.new_empty(tokens, dtype=torch.float32)
    geglu_kernel[(tokens,)](
        gu_TI, bound, p, c, columns, gu_TI.stride(0), columns + more, BLOCK=triton.next_power_of_2(columns), num_warps=16
    )
    return p, c


@triton.jit
def geglu_backward_kernel(dp, gu, c, sums, tokens, columns, dp_stride, gu_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_sum, up_sum = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = (at < columns) & (row < tokens)
        gate_at, up_at = gu + row * gu_stride + at, gu + row * gu_stride + columns + at
        gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dp + row * dp_stride + at, mask=inside, other=0.0).to(tl.float32) * tl.load(c + row, mask=row < tokens, other=0.0)
        share = _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        d_gate = grad * up * (share + gate * share * (1.0 - share) * slope)
        d_up = grad * gate * share
        gate_sum += d_gate * gate
        up_sum += d_up * up
        tl.store(gate_at, d_gate.to(gu.dtype.element_ty), mask=inside)
        tl.store(up_at, d_up.to(gu.dtype.element_ty), mask=inside)
    place = sums + tl.program_id(0).to(tl.int64) * 2 * columns + at
    tl.store(place, gate_sum, mask=at < columns)
    tl.store(place + columns, up_sum, mask=at < columns)


def geglu_backward_(dp_TI: Tensor, gu_TI: Tensor, c_T: Tensor) -> Tensor:
    tokens, columns = dp_TI.shape
    blocks = triton.cdiv(tokens, _ROWS)
    sums = c_T.new_empty(blocks, 2 * columns)
    geglu_backward_kernel[(blocks, triton.cdiv(columns, 256))](
        dp_TI, gu_TI, c_T, sums, tokens, columns, dp_TI.stride(0), gu_TI.stride(0), ROWS=_ROWS, BLOCK=256, num_warps=4
    )
    return sums.sum(0)


@triton.jit
def column_dot_kernel(dy, y, sums, tokens, columns, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = (at < columns) & (row < tokens)
        left = tl.load(dy + row * stride + at, mask=inside, other=0.0).to(tl.float32)
        total += left * tl.load(y + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0).to(tl.int64) * columns + at, total, mask=at < columns)


def column_dot(dy_TO: Tensor, y_TO: Tensor) -> Tensor:
    assert dy_TO.stride(1) == 1 and y_TO.is_contiguous()
    tokens, columns = y_TO.shape
    blocks = triton.cdiv(tokens, _ROWS)
    sums = dy_TO.new_empty(blocks, columns, dtype=torch.float32)
    column_dot_kernel[(blocks, triton.cdiv(columns, 256))](
        dy_TO, y_TO, sums, tokens, columns, dy_TO.stride(0), ROWS=_ROWS, BLOCK=256, num_warps=4
    )
    return sums.sum(0)


@triton.jit
def pack_kernel(x, out, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + at, mask=at < columns, other=0.0)
    largest = _pow2_floor(tl.maximum(tl.max(tl.abs(value)), 1e-30))
    inverse = (0x7F000000 - largest.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True) * 16384.0  # 1 / a power of two, exactly
    tl.store(out + row * columns + at, (value * inverse).to(out.dtype.element_ty), mask=at < columns)
    tl.store(scale + row, largest * 6.103515625e-05)


def pack(x_TH: Tensor, out_TH: Tensor) -> Tensor:
    tokens, columns = x_TH.shape
    scale = x_TH.new_empty(tokens)
    pack_kernel[(tokens,)](x_TH, out_TH, scale, columns, BLOCK=triton.next_power_of_2(columns), num_warps=8)
    return scale


@triton.jit
def unpack_kernel(packed, scale, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(packed + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, value * tl.load(scale + row), mask=at < columns)


def unpack(packed_TH: Tensor, scale_T: Tensor) -> Tensor:
    tokens, columns = packed_TH.shape
    out = packed_TH.new_empty(packed_TH.shape, dtype=torch.float32)
    unpack_kernel[(tokens,)](packed_TH, scale_T, out, columns, BLOCK=triton.next_power_of_2(columns), num_warps=8)
    return out


@triton.jit
def regroup_kernel(grad, o, c, out, delta, tokens, stride, KV: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, WIDE)
    place = row * (KV * GROUP * WIDE) + head * WIDE + at
    value = tl.load(grad + place).to(tl.float32)
    to = (head // GROUP * tokens + row) * GROUP + head % GROUP
    tl.store(delta + to, tl.sum(value * tl.load(o + row * stride + head * WIDE + at).to(tl.float32)))
    tl.store(out + to * WIDE + at, (value * tl.load(c + row)).to(out.dtype.element_ty))


def regroup(do_TO: Tensor, o_TO: Tensor, c_T: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    (kv, group), tokens = heads, len(do_TO)
    wide = do_TO.shape[1] // (kv * group)
    out, delta = do_TO.new_empty(kv, tokens, group, wide), c_T.new_empty(kv, tokens, group)
    regroup_kernel[(tokens, kv * group)](do_TO, o_TO, c_T, out, delta, tokens, o_TO.stride(0), KV=kv, GROUP=group, WIDE=wide, num_warps=1)
    return out, delta


@triton.jit
def row_norms_kernel(squares, wa, ba, b, n, scale, num_rows, RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    at = row[:, None] * RANK + column[None, :]
    inside = (row < num_rows)[:, None] & (column < RANK)[None, :]
    mixed = 2.0 * scale * tl.load(wa + at, mask=inside, other=0.0) + scale * scale * tl.load(ba + at, mask=inside, other=0.0)
    more = tl.sum(tl.load(b + at, mask=inside, other=0.0) * mixed, axis=1)
    total = tl.load(squares + row, mask=row < num_rows, other=0.0) + more
    tl.store(n + row, tl.sqrt(tl.maximum(total, 0.0)), mask=row < num_rows)


def row_norms(squares_O: Tensor, wa_OR: Tensor, ba_OR: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    n_O, (num_rows, rank) = torch.empty_like(squares_O), b_OR.shape
    row_norms_kernel[(triton.cdiv(num_rows, 16),)](
        squares_O, wa_OR, ba_OR, b_OR, n_O, scale, num_rows, RANK=rank, WIDE=triton.next_power_of_2(rank), ROWS=16, num_warps=4
    )
    return n_O


def kernels() -> dict[str, Any]:
    """Every kernel by its name, for the tests that compile them without a card."""
    return {name: value for name, value in (vars(fused_softmax) | globals()).items() if name.endswith("_kernel")}
