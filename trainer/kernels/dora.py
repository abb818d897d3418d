"""DoRA on frozen NF4 matrices, exactly, for about the price of LoRA (arXiv 2402.09353, equation 5 and section 4.3).

V = W + s B A, n = row norms of V (a constant in backward), g = m / n, y = g * (V x). s = alpha / sqrt(r) with rsLoRA.

    norm      n^2 = |W|^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B): |W|^2 once for ever, the rest after an optimizer
              step. No dense B A, no eye(I), no float32 copy of W; float32 accumulation.
    forward   y = X (g W)^T + s (X A^T) (g B)^T, with g inside of the dequantised W and of the 16-bit B
    backward  P = s dY (g B): dX = dY (g W) + P A, dA = P^T X, dB = s g * (dY^T (X A^T)), dm = (1 / m) colsum(dY * Y)

A new adapter's m comes from the routine that computes n, so that g is 1 to the bit, and with B = 0 the output is QLoRA's.

Memory of a linear, T tokens: X, which the layer holds anyway; X A^T [T, r]; Y, which the next operation holds anyway. g W lives
while it is needed for the layer at work. Not done: one product over [X, X A^T] and [g W, s g B], which would save a pass over Y
but needs X in a wider buffer.

Legend: T tokens, I inputs, O outputs, R rank. A Group is one or several matrices that read the same X, side by side in O.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.nf4 import Nf4

LIFT = 256.0
"""B is multiplied by it in 16 bits, and the product divided again, exactly: a B of 1e-6 keeps its digits in float16."""


class Adapter(NamedTuple):
    """One linear's trainable tensors, float32: A [R, I], B [O, R], DoRA's m [O] or None for plain LoRA."""

    a_RI: Tensor
    b_OR: Tensor
    m_O: Tensor | None


class Gradients(NamedTuple):
    """As Adapter."""

    a_RI: Tensor
    b_OR: Tensor
    m_O: Tensor | None


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 (float64 stays) from 16-bit operands, accumulated there."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right) if left.dtype in (torch.float32, torch.float64) else torch.mm(left.float(), right.float())


class Group:
    """Matrices that read one input. `ops` is plain.py or fused.py."""

    def __init__(
        self, weights: Sequence[Nf4], adapters: Sequence[Adapter | None], scale: float, dtype: torch.dtype, ops: ModuleType
    ) -> None:
        self.weights, self.adapters, self.scale, self.dtype, self._ops = tuple(weights), tuple(adapters), scale, dtype, ops
        ends = [0]
        for weight in weights:
            ends.append(ends[-1] + weight.shape[0])
        self.slices = tuple(slice(*ends) for ends in pairwise(ends))
        self.out, self.wide = ends[-1], weights[0].shape[1]
        device = weights[0].codes.device
        self._ranks = [0 if adapter is None else len(adapter.a_RI) for adapter in adapters]
        self.squares_O = self._squared_norms(device)
        self.norms_O = self.squares_O.sqrt()
        self.gain_O: Tensor | None = None
        self._lifted_O = torch.full_like(self.norms_O, LIFT)
        self.bound = self.norms_O.max()
        """Scalar: the largest row norm of what y is the product with."""

    def start(self) -> None:
        """m of a new adapter, by the very routine that computes n."""
        self.refresh()
        for adapter, part in zip(self.adapters, self.slices, strict=True):
            if adapter is not None and adapter.m_O is not None:
                adapter.m_O.data.copy_(self.norms_O[part])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """To be called after A, B or m changed: n and g of today's adapter."""
        if any(adapter is not None for adapter in self.adapters):
            w_OI = self.dequantized(folded=False)
            for adapter, part in zip(self.adapters, self.slices, strict=True):
                if adapter is not None:
                    self.norms_O[part] = self._norm(adapter, w_OI[part], self.squares_O[part])
        self._take()

    def dequantized(self, *, folded: bool = True) -> Tensor:
        """[O, I]: g W, or W."""
        w_OI = torch.empty(self.out, self.wide, dtype=self.dtype, device=self.norms_O.device)
        gain = self.gain_O if folded else None
        for weight, part in zip(self.weights, self.slices, strict=True):
            self._ops.dequantize(weight, None if gain is None else gain[part], w_OI[part])
        return w_OI

    def forward(self, x_TI: Tensor, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        """y [T, O] and X A^T [T, R of each adapter side by side]; w is dequantized()."""
        y_TO = torch.mm(x_TI, w_OI.t())
        xa_TR = self.reduced(x_TI)
        for number, columns in self._columns():
            self._add(y_TO[:, self.slices[number]], xa_TR[:, columns], self._b(number).t(), self.scale / LIFT)
        return y_TO, xa_TR

    def reduced(self, x_TI: Tensor) -> Tensor:
        """X A^T, which backward needs even where y was kept."""
        return torch.mm(x_TI, self._a().t())

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor, xa_TR: Tensor, w_OI: Tensor, sums_O: Tensor, *, into: Tensor | None = None
    ) -> tuple[Tensor, list[Gradients | None]]:
        """dX [T, I], and the gradients of each adapter. sums: colsum(dY * Y) [O] float32. into: where dX is written."""
        a_RI = self._a()
        p_TR = torch.empty_like(xa_TR)
        for number, columns in self._columns():
            p_TR[:, columns] = product(dy_TO[:, self.slices[number]], self._b(number)) * (self.scale / LIFT)
        da_RI = product(p_TR.t(), x_TI)
        gradients: list[Gradients | None] = [None] * len(self.adapters)
        for number, columns in self._columns():
            adapter, part = self.adapters[number], self.slices[number]
            assert adapter is not None
            db_OR = product(dy_TO[:, part].t(), xa_TR[:, columns])
            if self.gain_O is not None:
                db_OR *= (self.scale * self.gain_O[part])[:, None]
            else:
                db_OR *= self.scale
            dm_O = None if adapter.m_O is None else torch.where(adapter.m_O == 0, 0, sums_O[part] / adapter.m_O)
            gradients[number] = Gradients(da_RI[columns], db_OR, dm_O)
        dx_TI = torch.mm(dy_TO, w_OI) if into is None else torch.mm(dy_TO, w_OI, out=into)
        if len(a_RI):
            dx_TI.addmm_(p_TR, a_RI)
        return dx_TI, gradients

    def _take(self) -> None:
        """g, and what follows from it."""
        gain_O = torch.ones_like(self.norms_O)
        for adapter, part in zip(self.adapters, self.slices, strict=True):
            if adapter is not None and adapter.m_O is not None:
                gain_O[part] = adapter.m_O / self.norms_O[part]
        has_magnitude = any(adapter is not None and adapter.m_O is not None for adapter in self.adapters)
        self.gain_O = gain_O if has_magnitude else None
        self._lifted_O = gain_O * LIFT
        self.bound = (self.norms_O * gain_O.abs()).max()

    def _norm(self, adapter: Adapter, w_OI: Tensor, squares_O: Tensor) -> Tensor:
        a_RI = adapter.a_RI
        wa_OR = product(w_OI, a_RI.to(self.dtype).t())
        ba_OR = adapter.b_OR @ (a_RI @ a_RI.t())
        return self._ops.row_norms(squares_O, wa_OR, ba_OR, adapter.b_OR, self.scale)  # type: ignore[no-any-return]

    def _squared_norms(self, device: torch.device) -> Tensor:
        """|W|^2 [O], 1024 rows in float32 at a time."""
        w_OI = torch.empty(self.out, self.wide, dtype=self.dtype, device=device)
        for weight, part in zip(self.weights, self.slices, strict=True):
            self._ops.dequantize(weight, None, w_OI[part])
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.cat([rows.to(wide).square().sum(1) for rows in w_OI.split(1024)])

    def _columns(self) -> list[tuple[int, slice]]:
        """(number of the linear, its columns of X A^T) of every linear with an adapter."""
        found, start = [], 0
        for number, rank in enumerate(self._ranks):
            if rank:
                found.append((number, slice(start, start + rank)))
            start += rank
        return found

    def _a(self) -> Tensor:
        a_RI = torch.empty(sum(self._ranks), self.wide, dtype=self.dtype, device=self.norms_O.device)
        for number, columns in self._columns():
            adapter = self.adapters[number]
            assert adapter is not None
            a_RI[columns] = adapter.a_RI
        return a_RI

    def _b(self, number: int) -> Tensor:
        """LIFT g B [O, R] in 16 bits."""
        adapter = self.adapters[number]
        assert adapter is not None
        b_OR = torch.empty(adapter.b_OR.shape, dtype=self.dtype, device=adapter.b_OR.device)
        return torch.mul(adapter.b_OR, self._lifted_O[self.slices[number]][:, None], out=b_OR)

    @staticmethod
    def _add(y: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
        torch.addmm(y, left, right, alpha=alpha, out=y)


# --- at PEFT's seam, where W x comes from elsewhere


@torch.library.custom_op("trinity::dora", mutates_args=())
def dora(base_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, m_O: Tensor, n_O: Tensor, scale: float) -> Tensor:
    """y = (m / n) * (base + scale (x A^T) B^T), base = x W^T; one custom op, so that a compiler leaves it whole.

    Adapter in float32, base and x in the model's dtype, which is y's. A leading batch axis is allowed.
    """
    flat, base = (some.reshape(-1, some.shape[-1]).to(a_RI.dtype) for some in (x_TI, base_TO))
    y = torch.addmm(base, flat @ a_RI.t(), b_OR.t(), alpha=scale).mul_(m_O / n_O)
    return y.to(base_TO.dtype).view(base_TO.shape)


@dora.register_fake
def _(base_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, m_O: Tensor, n_O: Tensor, scale: float) -> Tensor:
    return torch.empty_like(base_TO)


@torch.library.custom_op("trinity::dora_backward", mutates_args=())
def dora_backward(
    dy: Tensor, y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, m_O: Tensor, n_O: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of base, x, A, B and m."""
    wide = a_RI.dtype
    flat, dy_TO = x.reshape(-1, x.shape[-1]).to(wide), dy.reshape(-1, dy.shape[-1]).to(wide)
    dbase_TO = dy_TO * (m_O / n_O)
    p_TR = scale * (dbase_TO @ b_OR)
    db_OR = scale * (dbase_TO.t() @ (flat @ a_RI.t()))
    dm_O = torch.where(m_O == 0, 0, (dy_TO * y.reshape(dy_TO.shape).to(wide)).sum(0) / m_O)
    return dbase_TO.to(dy.dtype).view(dy.shape), (p_TR @ a_RI).to(x.dtype).view(x.shape), p_TR.t() @ flat, db_OR, dm_O


@dora_backward.register_fake
def _(
    dy: Tensor, y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, m_O: Tensor, n_O: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(dy), torch.empty_like(x), torch.empty_like(a_RI), torch.empty_like(b_OR), torch.empty_like(m_O)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, x, a_RI, b_OR, m_O, n_O, ctx.scale = inputs
    ctx.save_for_backward(output, x, a_RI, b_OR, m_O, n_O)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    y, x, a_RI, b_OR, m_O, n_O = ctx.saved_tensors
    return (*dora_backward(dy.contiguous(), y, x, a_RI, b_OR, m_O, n_O, ctx.scale), None, None)


dora.register_autograd(_backward, setup_context=_save)
