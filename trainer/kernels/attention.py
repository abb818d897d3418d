"""Causal attention with a window and document boundaries, over heads in groups, in memory that grows with T only.

Token i sees keys first[i] .. i, where first[i] is the start of its document or i - window + 1, whichever is later: HF's causal,
sliding (i - j < w) and per-document mask in one number a token.

Three ways, chosen at installation, never by falling back:

    plain      dense scores in torch, for CPUs and as the reference
    turing     forward: CUTLASS efficient attention through torch's operator (tensor cores of sm_75; windows skipped). backward: blocks
               of queries against their band of keys as batched cuBLAS products with one elementwise kernel in between. The query heads
               of a group are rows of one matrix, so that K and V are never repeated; dK and dV add up in float32.
    flash      FlashAttention-2 through torch's operator, for cards that have it

Backward of a block, scores S = Q K^T and dP = dO V^T in float32: P = exp(S scale - lse), dS = P (dP - delta) scale,
dV += P^T dO, dK += dS^T Q, dQ = dS K (arXiv 2307.08691, section 3.1.2).

Legend: K key heads, G query heads of each, T tokens, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_TOKENS = 512
"""Queries of a block of the banded backward."""
ALIGN = 8
"""cuBLAS takes tensor cores' fast kernels only where rows of 16-bit values begin on 16 bytes:
a band of 1,535 keys took 3 times as long as one of 1,536 (H100)."""
BAND_BYTES = 256 * 1024**2
"""Bound of a block's scores in all four forms; fewer heads at a time keep it."""


class Documents(NamedTuple):
    """Where documents begin in a row of T tokens, on the host and on the device."""

    starts: tuple[int, ...]
    """0 and then the end of each document: cu_seqlens."""
    cu_seqlens: Tensor
    """The same, int32 on the device."""

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @property
    def longest(self) -> int:
        return max(end - start for start, end in zip(self.starts, self.starts[1:], strict=False))


class Saved(NamedTuple):
    """Output [K, T, G, D], and its logsumexp in whatever form the same way's backward reads."""

    out: Tensor
    lse: Tensor


class Attention(Protocol):
    """One way to compute it, for one batch and one window."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved: ...
    def backward(
        self, do_TO: Tensor, o_TO: Tensor, lse: Tensor, c_T: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """o [T, K G D (and more)] is the output scaled by c, do its gradient. Returns dq [K, T, G, D], dk and dv [K, T, D]."""


def documents(starts: Sequence[int], device: torch.device) -> Documents:
    return Documents(tuple(starts), torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True))


def first_keys(where: Documents, window: int | None) -> Tensor:
    """[T] int32 on the device."""
    lengths = torch.tensor([end - start for start, end in zip(where.starts, where.starts[1:], strict=False)])
    first = torch.repeat_interleave(torch.tensor(where.starts[:-1]), lengths)
    if window is not None:
        first = torch.maximum(first, torch.arange(where.tokens) - window + 1)
    return first.int().to(where.cu_seqlens.device, non_blocking=True)


class Plain:
    """Dense, for CPUs: [heads, T, T] scores."""

    def __init__(self, where: Documents, window: int | None, scale: float, ops: ModuleType) -> None:
        self._first, self._scale, self._ops = first_keys(where, window), scale, ops

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        scores = self._rows(q) @ k.transpose(1, 2) * self._scale
        token = torch.arange(q.shape[1], device=q.device).repeat_interleave(q.shape[2])
        key = torch.arange(q.shape[1], device=q.device)
        seen = (key[None] <= token[:, None]) & (key[None] >= self._first[token][:, None])
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen, -math.inf)
        lse = torch.logsumexp(scores, -1)
        out = torch.exp(scores - lse[..., None]).to(v.dtype) @ v
        return Saved(out.view(q.shape), lse.view(q.shape[:3]))

    def backward(
        self, do_TO: Tensor, o_TO: Tensor, lse: Tensor, c_T: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, delta = self._ops.regroup(do_TO, o_TO, c_T, (q.shape[0], q.shape[2]))
        s, dp = self._rows(q) @ k.transpose(1, 2), self._rows(grad) @ v.transpose(1, 2)
        p, ds = self._ops.softmax_backward(s, dp, lse.flatten(1), delta.flatten(1), self._first, self._scale, (0, 0, q.shape[2]), q.dtype)
        return (ds @ k).view(q.shape), ds.transpose(1, 2) @ self._rows(q), p.transpose(1, 2) @ self._rows(grad)

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        """[K, T G, D]: query heads of a group as rows."""
        return x.flatten(1, 2)


class Sdpa:
    """torch's own scaled_dot_product_attention with a dense mask, for a comparison: kernels.attention = "stock"."""

    def __init__(self, where: Documents, window: int | None, scale: float, ops: ModuleType) -> None:
        token = torch.arange(where.tokens, device=where.cu_seqlens.device)
        first = first_keys(where, window)
        self._mask, self._scale, self._ops = (token[None] <= token[:, None]) & (token[None] >= first[:, None]), scale, ops

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        return Saved(self._output(q, k, v), q.new_zeros(q.shape[:3], dtype=torch.float32))

    def backward(
        self, do_TO: Tensor, o_TO: Tensor, lse: Tensor, c_T: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [value.detach().requires_grad_() for value in (q, k, v)]
        with torch.enable_grad():
            out = self._output(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, self._ops.regroup(do_TO, o_TO, c_T, (q.shape[0], q.shape[2]))[0])
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def _output(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.permute(0, 2, 1, 3).flatten(0, 1)[None]
        out = torch.nn.functional.scaled_dot_product_attention(
            heads, k[None], v[None], attn_mask=self._mask, scale=self._scale, enable_gqa=True
        )
        split: Tensor = out[0].unflatten(0, q.shape[0:3:2])
        return split.transpose(1, 2)


class Turing:
    def __init__(self, where: Documents, window: int | None, scale: float, ops: ModuleType) -> None:
        self._where, self._window, self._scale, self._ops = where, window, scale, ops
        self._first = first_keys(where, window)
        starts, device = torch.tensor(where.starts), where.cu_seqlens.device
        document = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        self._document = document.to(device, non_blocking=True)
        self._position = (torch.arange(where.tokens) - starts[document]).to(device, non_blocking=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        """Key heads behind each other are so many documents more, and the query heads of a group see the same k and v by a stride of 0:
        one call, and nothing is repeated."""
        kv, tokens, group, wide = q.shape
        where = self._where
        ends = (torch.arange(kv, device=q.device, dtype=torch.int32)[:, None] * tokens + where.cu_seqlens[1:]).flatten()
        starts = functional.pad(ends, (1, 0))
        k, v = (x.view(1, kv * tokens, 1, wide).expand(-1, -1, group, -1) for x in (k, v))
        out, raw, *_ = torch.ops.aten._efficient_attention_forward(
            q.view(1, kv * tokens, group, wide), k, v, None, starts, starts, where.longest, where.longest, 0.0, 1, True,
            scale=self._scale, window_size=self._window,
        )  # fmt: skip
        lse = raw.unflatten(0, (kv, -1))[:, self._document, :, self._position]  # [T, K, G]
        return Saved(out.view(q.shape), lse.transpose(0, 1).contiguous())

    def backward(
        self, do_TO: Tensor, o_TO: Tensor, lse: Tensor, c_T: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv, tokens, group, wide = q.shape
        grad, delta = self._ops.regroup(do_TO, o_TO, c_T, (kv, group))
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(kv, tokens, wide, dtype=torch.float32, device=q.device) for _ in range(2))
        rows_q, rows_grad, rows_dq = q.flatten(1, 2), grad.flatten(1, 2), dq.flatten(1, 2)
        lse, delta = lse.flatten(1), delta.flatten(1)
        for t0, t1, lo in bands(self._where.starts, self._window):
            rows, keys = slice(t0 * group, t1 * group), slice(lo, t1)
            for heads in self._heads(kv, (t1 - t0) * group * (t1 - lo)):
                q_b, k_b, grad_b = rows_q[heads, rows], k[heads, keys], rows_grad[heads, rows]
                s = torch.bmm(q_b, k_b.transpose(1, 2), out_dtype=torch.float32)
                dp = torch.bmm(grad_b, v[heads, keys].transpose(1, 2), out_dtype=torch.float32)
                p, ds = self._ops.softmax_backward(
                    s, dp, lse[heads, rows], delta[heads, rows], self._first, self._scale, (t0, lo, group), q.dtype
                )
                del s, dp
                self._accumulate(dv[heads, keys], p, grad_b)
                self._accumulate(dk[heads, keys], ds, q_b)
                torch.bmm(ds, k_b, out=rows_dq[heads, rows])
        return dq, dk, dv

    @staticmethod
    def _accumulate(total: Tensor, probabilities: Tensor, values: Tensor) -> None:
        """total += probabilities^T values, in float32."""
        torch.ops.aten.baddbmm.dtype_out(total, probabilities.transpose(1, 2), values, torch.float32, out=total)

    @staticmethod
    def _heads(kv: int, scores: int) -> Iterator[slice]:
        """Key heads in turns, so that S, dP (4 bytes each), P and dS (2 each) stay below BAND_BYTES."""
        most = max(1, min(kv, BAND_BYTES // (12 * scores)))
        return (slice(start, min(start + most, kv)) for start in range(0, kv, most))


class Flash:
    def __init__(self, where: Documents, window: int | None, scale: float, ops: ModuleType) -> None:
        self._where, self._left, self._scale, self._ops = where, None if window is None else window - 1, scale, ops

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            self._merged(q), k.transpose(0, 1), v.transpose(0, 1), *self._lengths(), 0.0, True, False, scale=self._scale,
            window_size_left=self._left, window_size_right=None if self._left is None else 0,
        )  # fmt: skip
        return Saved(out.unflatten(1, q.shape[0:3:2]).transpose(0, 1), lse)

    def backward(
        self, do_TO: Tensor, o_TO: Tensor, lse: Tensor, c_T: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """c cancels in delta only: the output is unscaled before, the gradient scaled."""
        kv, tokens, group, wide = q.shape
        shape = (tokens, kv * group, wide)
        grad = (do_TO * c_T[:, None].to(do_TO.dtype)).view(shape)
        out = (o_TO[:, : do_TO.shape[1]] / c_T[:, None].to(do_TO.dtype)).view(shape)
        nothing = torch.empty(2, dtype=torch.uint64, device=q.device)  # the random state of a dropout that is not there
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, self._merged(q), k.transpose(0, 1), v.transpose(0, 1), out, lse, *self._lengths(), 0.0, True, nothing, nothing,
            scale=self._scale, window_size_left=self._left, window_size_right=None if self._left is None else 0,
        )  # fmt: skip
        return (
            dq.view(tokens, kv, group, wide).permute(1, 0, 2, 3).contiguous(),
            dk.transpose(0, 1).contiguous(),
            dv.transpose(0, 1).contiguous(),
        )

    def _lengths(self) -> tuple[Tensor, Tensor, int, int]:
        where = self._where
        return where.cu_seqlens, where.cu_seqlens, where.longest, where.longest

    @staticmethod
    def _merged(q: Tensor) -> Tensor:
        """[T, K G, D]."""
        return q.permute(1, 0, 2, 3).reshape(q.shape[1], -1, q.shape[3])


def bands(starts: Sequence[int], window: int | None, block: int = BLOCK_TOKENS) -> Iterator[tuple[int, int, int]]:
    """(first query, end, first key) of each block: at most `block` queries and the keys that any of them sees.

    A block that lies in one document begins its keys there, on a multiple of ALIGN; short documents share a block.
    """
    tokens = starts[-1]
    document = 0
    for t0 in range(0, tokens, block):
        while starts[document + 1] <= t0:
            document += 1
        lo = starts[document] if window is None else max(starts[document], t0 - window + 1)
        yield t0, min(t0 + block, tokens), lo // ALIGN * ALIGN
