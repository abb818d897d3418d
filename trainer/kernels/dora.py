"""DoRA on frozen NF4 matrices, exactly, for about the price of LoRA (arXiv 2402.09353, equation 5 and section 4.3).

V = W + s B A, n = row norms of V (a constant in backward), g = m / n, y = g * (V x). s = alpha / sqrt(r) with rsLoRA.

    norm      n^2 = |W|^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B): |W|^2 once for ever, the rest after an optimizer
              step. No dense B A, no eye(I), no float32 copy of W; float32 accumulation.
    forward   y = X (g W)^T + s (X A^T) (g B)^T, with g inside of the dequantised W and of the 16-bit B
    backward  P = s dY (g B): dX = dY (g W) + P A, dA = P^T X, dB = s g * (dY^T (X A^T)), dm = (1 / m) colsum(dY * Y)

Both sums of two products are one product each, over a matrix that holds all of it:

    M = [ g W   s g L B ]    y  = [X | X A^T / L] M[:O]^T
        [ A / L    -    ]    dX = [dY | P L] M[:, :I]         P L = dY M[:O, I:],  X A^T / L = X M[O:, :I]^T

so that no pass over Y or dX adds the adapter's share. X and dY lie in buffers with R columns more, where X A^T and P are put. The
power of two L keeps a B of 1e-6 among float16's normal numbers.

A new adapter's m comes from the routine that computes n, so that g is 1 to the bit, and with B = 0 the output is QLoRA's.

Memory of a linear, T tokens: X and R columns, which the layer holds anyway; Y, which the next operation holds anyway. M lives while it
is needed for the layer at work.

Legend: T tokens, I inputs, O outputs, R ranks of all adapters of a Group: one or several matrices that read the same X, side by side in O.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.kernels.nf4 import Nf4

LIFT = 16.0
"""L."""


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
        ends = list(accumulate((weight.shape[0] for weight in weights), initial=0))
        self.slices = tuple(slice(*pair) for pair in pairwise(ends))
        self.out, self.wide = ends[-1], weights[0].shape[1]
        ranks = list(accumulate((len(adapter.a_RI) if adapter else 0 for adapter in adapters), initial=0))
        self._ranks = tuple(slice(*pair) for pair in pairwise(ranks))
        self.more = ranks[-1]
        """R: columns behind X and dY."""
        self._device = weights[0].codes.device
        self.squares_O = torch.cat([rows.to(_wide(dtype)).square().sum(1) for rows in self._dequantized().split(1024)])
        self.norms_O = self.squares_O.sqrt()
        self.gain_O: Tensor | None = None
        self._lifted_O = torch.empty_like(self.norms_O)
        self.bound = self.norms_O.max()
        """Scalar: the largest row norm of what y is the product with."""
        self._take()

    def start(self) -> None:
        """m of a new adapter, by the very routine that computes n."""
        self.refresh()
        for adapter, part in zip(self.adapters, self.slices, strict=True):
            if adapter is not None and adapter.m_O is not None:
                adapter.m_O.data.copy_(self.norms_O[part])
        self._take()

    @torch.no_grad()
    def refresh(self) -> None:
        """To be called after A, B or m changed: n and g of today's adapter."""
        if self.more:
            w_OI = self._dequantized()
            for adapter, part in zip(self.adapters, self.slices, strict=True):
                if adapter is not None:
                    self.norms_O[part] = self._norm(adapter, w_OI[part], self.squares_O[part])
        self._take()

    def matrix(self) -> Tensor:
        """M [O + R, I + R] in 16 bits; its corner is not written and never read."""
        matrix = torch.empty(self.out + self.more, self.wide + self.more, dtype=self.dtype, device=self._device)
        for weight, part in zip(self.weights, self.slices, strict=True):
            self._ops.dequantize(weight, None if self.gain_O is None else self.gain_O[part], matrix[part, : self.wide])
        if len(self.weights) > 1 and self.more:
            matrix[: self.out, self.wide :].zero_()  # B of one linear does not see the others' X A^T
        for adapter, part, ranks in zip(self.adapters, self.slices, self._ranks, strict=True):
            if adapter is not None:
                torch.mul(adapter.b_OR, self._lifted_O[part, None], out=matrix[part, self.wide :][:, ranks])
                torch.mul(adapter.a_RI, 1 / LIFT, out=matrix[self.out :][ranks, : self.wide])
        return matrix

    def forward(self, x_TI: Tensor, matrix: Tensor, into: Tensor | None = None) -> Tensor:
        """y [T, O] (or into[:, :O]). x: [T, I + R] with X in its first I columns; X A^T / L is written into the rest."""
        self.reduce(x_TI, matrix)
        return torch.mm(x_TI, matrix[: self.out].t(), out=None if into is None else into[:, : self.out])

    def reduce(self, x_TI: Tensor, matrix: Tensor) -> None:
        """X A^T / L alone, where y was kept."""
        if self.more:
            torch.mm(x_TI[:, : self.wide], matrix[self.out :, : self.wide].t(), out=x_TI[:, self.wide :])

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor, matrix: Tensor, sums_O: Tensor, *, into: Tensor | None = None
    ) -> tuple[Tensor, list[Gradients | None]]:
        """dX [T, I] (in into[:, :I], which may be x itself), and the gradients of each adapter.

        dy: [T, O + R] with dY in its first O columns. x: as forward left it. sums: colsum(dY * Y) [O] float32.
        """
        x, out = x_TI[:, : self.wide], None if into is None else into[:, : self.wide]
        gradients: list[Gradients | None] = [None] * len(self.adapters)
        if self.more:
            torch.mm(dy_TO[:, : self.out], matrix[: self.out, self.wide :], out=dy_TO[:, self.out :])
            da_RI = product(dy_TO[:, self.out :].t(), x).mul_(1 / LIFT)
            db_OR = product(dy_TO[:, : self.out].t(), x_TI[:, self.wide :])
            gradients = [
                None if adapter is None else self._gradients(adapter, da_RI[ranks], db_OR[part, ranks], sums_O[part], self._lifted_O[part])
                for adapter, part, ranks in zip(self.adapters, self.slices, self._ranks, strict=True)
            ]
        return torch.mm(dy_TO, matrix[:, : self.wide], out=out), gradients

    @staticmethod
    def _gradients(adapter: Adapter, da_RI: Tensor, db_OR: Tensor, sums_O: Tensor, lifted_O: Tensor) -> Gradients:
        dm_O = None if adapter.m_O is None else torch.where(adapter.m_O == 0, 0, sums_O / adapter.m_O)
        return Gradients(da_RI, db_OR * lifted_O[:, None], dm_O)

    @torch.no_grad()
    def _take(self) -> None:
        """g, and what follows from it."""
        gain_O = torch.ones_like(self.norms_O)
        for adapter, part in zip(self.adapters, self.slices, strict=True):
            if adapter is not None and adapter.m_O is not None:
                torch.div(adapter.m_O, self.norms_O[part], out=gain_O[part])
        has_magnitude = any(adapter is not None and adapter.m_O is not None for adapter in self.adapters)
        self.gain_O = gain_O if has_magnitude else None
        self._lifted_O = gain_O * (self.scale * LIFT)
        self.bound = (self.norms_O * gain_O.abs()).max()

    def _norm(self, adapter: Adapter, w_OI: Tensor, squares_O: Tensor) -> Tensor:
        a_RI = adapter.a_RI
        wa_OR = product(w_OI, a_RI.to(self.dtype).t())
        ba_OR = adapter.b_OR @ (a_RI @ a_RI.t())
        return self._ops.row_norms(squares_O, wa_OR, ba_OR, adapter.b_OR, self.scale)  # type: ignore[no-any-return]

    def _dequantized(self) -> Tensor:
        """W [O, I] in 16 bits."""
        w_OI = torch.empty(self.out, self.wide, dtype=self.dtype, device=self._device)
        for weight, part in zip(self.weights, self.slices, strict=True):
            self._ops.dequantize(weight, None, w_OI[part])
        return w_OI


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, a_RI, b_OR, m_O, n_O, ctx.scale = inputs
    ctx.save_for_backward(output, x, a_RI, b_OR, m_O, n_O)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, x, a_RI, b_OR, m_O, n_O = ctx.saved_tensors
    return (*dora_backward(dy.contiguous(), y, x, a_RI, b_OR, m_O, n_O, ctx.scale), None, None)


dora.register_autograd(_backward, setup_context=_save)
