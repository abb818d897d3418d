"""A Gemma 3 decoder layer with an adapter: forward, recompute and backward by hand.

    x -> rms -> q k v -> norm, rope -> attention -> o -> post norm, + x = x1        (`_attend`)
    x1 -> rms -> gate up -> geglu -> down -> post norm, + x1 = x2                   (in tiles of tokens)

The residual x is float32, what enters a matrix product has the model's dtype. o's and down's inputs are scaled by a power of two a row
so that float16 cannot overflow, and the norm behind them takes it out again (plain.scale_rows).

Between forward and backward only the input of a span of layers waits (offload.py), and outputs that a budget keeps. Backward runs
the span once more; the frozen weights ask for no gradient of their own, so that an output which is kept spares its whole product.

Memory of the backward of one layer, T tokens, t in a tile: x, x1, dx float32 [T, H]; q k v, turned q and k, o, h, a in 16 bits; of the
MLP gate|up [t, 2 I] in whose place the gradients are written, p [t, I] which dp overwrites, and the matrices of gate|up and down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.kernels.attention import Attention
from trainer.kernels.dora import Gradients, Group
from trainer.kernels.offload import Ticket, Waiting


class Pieces(NamedTuple):
    """plain.py or fused.py, by piece."""

    norms: ModuleType
    geglu: ModuleType
    rest: ModuleType


class Way(NamedTuple):
    """What all layers of one kind need of the batch at hand: attention (with its window) and rotations [T, D / 2]."""

    attention: Attention
    cos: Tensor
    sin: Tensor


class Batch(NamedTuple):
    """One forward pass of a row of T tokens."""

    near: Way
    far: Way
    waiting: Waiting
    kept: Mapping[int, Mapping[str, str]]
    """By layer: which outputs are kept, and where."""
    trains: bool


class Norms(NamedTuple):
    """Weights [H], and [D] of the heads."""

    before: Tensor
    q: Tensor
    k: Tensor
    after: Tensor
    mlp_before: Tensor
    mlp_after: Tensor


class Shape(NamedTuple):
    """heads: (key heads, query heads of each)."""

    heads: tuple[int, int]
    wide: int
    eps: float
    tile: int


class _Half(NamedTuple):
    """The attention half of a layer, as its backward needs it. h and o have room for the adapter's columns."""

    h: Tensor
    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    c: Tensor
    a: Tensor
    x1: Tensor


class Layer(nn.Module):
    """Stands where a decoder layer stood and keeps its sub-modules under their names, so that parameters keep theirs."""

    def __init__(
        self, number: int, stock: nn.Module, groups: Mapping[str, Group], norms: Norms, shape: Shape, far: bool, pieces: Pieces
    ) -> None:
        super().__init__()
        for name, child in stock.named_children():
            self.add_module(name, child)
        self.number, self.far, self._shape, self._pieces = number, far, shape, pieces
        self.groups, self._norms = dict(groups), norms
        self.counts = {"linear forward": 0, "linear backward": 0, "attention forward": 0, "attention backward": 0}
        """Calls since the layer was made."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("Trinity's decoder layers are driven by Stack.hidden, not by the model's own forward pass")

    def parameters_in_order(self) -> list[Tensor]:
        """Every trainable tensor, group by group, as gradients come from `backward`."""
        return [value for group in self.groups.values() for adapter in group.adapters if adapter for value in adapter if value is not None]

    def run(self, x: Tensor, batch: Batch, tickets: dict[str, Ticket | None] | None) -> Tensor:
        """x2 [T, H] from x. tickets: outputs that wait from before; or an empty dict, which is filled."""
        first = tickets is not None and not tickets
        half = self._attend(x, batch, tickets)
        if first:
            assert tickets is not None
            self._keep(tickets, batch, {"o": half.a, "qkv": half.qkv, "attention": half.o, "lse": half.lse})
        x1, dtype = half.x1, half.h.dtype
        del half
        d = self._kept(tickets, batch, "down")
        if d is None:
            more = self.groups["gate_up"].more
            d, c_d = self._mlp(self._pieces.norms.rms(x1, self._norms.mlp_before, self._shape.eps, dtype, more), batch, tickets, first)
        else:
            c_d = self._get(tickets, batch, "c_d")
        return self._pieces.norms.rms_residual(d, x1, self._norms.mlp_after, self._shape.eps, c_d)  # type: ignore[no-any-return]

    def _mlp(self, h: Tensor, batch: Batch, tickets: dict[str, Ticket | None] | None, first: bool) -> tuple[Tensor, Tensor]:
        """down's output [T, H], scaled by c [T]."""
        into, down = self.groups["gate_up"], self.groups["down"]
        m_into, m_down = into.matrix(), down.matrix()
        d, c_d = h.new_empty(len(h), down.out), h.new_empty(len(h), dtype=_wide(h.dtype))
        gates = []
        for rows in self._tiles(len(h)):
            gu = h.new_empty(rows.stop - rows.start, into.out + into.more)
            self._product(into, h[rows], m_into, gu)
            p, c_d[rows] = self._pieces.geglu.geglu(gu, down.bound, down.wide, down.more)
            self._product(down, p, m_down, d[rows])
            if first and "gate_up" in batch.kept.get(self.number, {}):
                gates.append(gu)
        if first:
            assert tickets is not None
            tickets["c_d"] = Ticket(c_d, None, None)
            self._keep(tickets, batch, {"down": d, **({"gate_up": torch.cat(gates) if len(gates) > 1 else gates[0]} if gates else {})})
        return d, c_d

    def backward(self, x: Tensor, dx: Tensor, batch: Batch, tickets: dict[str, Ticket | None], needs_dx: bool) -> list[Tensor]:
        """dx [T, H] float32 becomes the gradient of x, in place; returns the gradients of parameters_in_order()."""
        half = self._attend(x, batch, tickets)
        found: dict[str, list[Gradients | None]] = {}
        self._mlp_backward(half, dx, batch, tickets, found)
        batch.waiting.ahead()  # not before: at the MLP's peak there is no room for it
        norms, ops, eps = self._norms, self._pieces, self._shape.eps
        out, into = self.groups["o"], self.groups["qkv"]
        da = ops.norms.rms_residual_backward(dx, half.a, norms.after, eps, half.c, out.more)
        matrix = out.matrix()
        if tickets.get("o") is not None:
            out.reduce(half.o, matrix)
        do, found["o"] = self._gradients(out, da, half.o, matrix, ops.rest.column_dot(da, half.a))
        del da, matrix
        way = batch.far if self.far else batch.near
        self.counts["attention backward"] += 1
        dq, dk, dv = way.attention.backward(do, half.o, half.lse, half.c, half.q, half.k, half.v)
        dy = ops.norms.turn_backward(dq, dk, dv, half.qkv, norms.q, norms.k, way.cos, way.sin, self._shape.heads, eps, into.more)
        del do, dq, dk, dv
        matrix = into.matrix()
        if tickets.get("qkv") is not None:
            into.reduce(half.h, matrix)
        dh, found["qkv"] = self._gradients(into, dy, half.h, matrix, ops.rest.column_dot(dy, half.qkv), into=half.h)
        if needs_dx:
            ops.norms.rms_backward_(dh, x, norms.before, eps, dx)
        return [value for name in self.groups for one in found[name] if one for value in one if value is not None]

    def _mlp_backward(
        self, half: _Half, dx: Tensor, batch: Batch, tickets: dict[str, Ticket | None], found: dict[str, list[Gradients | None]]
    ) -> None:
        """Tile by tile: recompute, gradients of down, of geglu, of gate and up; dx takes what reaches x1."""
        into, down, norms, eps = self.groups["gate_up"], self.groups["down"], self._norms, self._shape.eps
        ops = self._pieces
        h = ops.norms.rms(half.x1, norms.mlp_before, eps, half.h.dtype, into.more)
        kept_d, kept_gu = self._kept(tickets, batch, "down"), self._kept(tickets, batch, "gate_up")
        m_into, m_down = into.matrix(), down.matrix()
        for rows in self._tiles(len(h)):
            if kept_gu is None:
                gu = h.new_empty(rows.stop - rows.start, into.out + into.more)
                self._product(into, h[rows], m_into, gu)
            else:
                gu = kept_gu[rows]
                into.reduce(h[rows], m_into)
            p, c = ops.geglu.geglu(gu, down.bound, down.wide, down.more)
            if kept_d is None:
                d = self._product(down, p, m_down)
            else:
                d = _rescaled(kept_d[rows], self._get(tickets, batch, "c_d")[rows], c)
                down.reduce(p, m_down)
            dd = ops.norms.rms_residual_backward(dx[rows], d, norms.mlp_after, eps, c, down.more)
            dp, of_down = self._gradients(down, dd, p, m_down, ops.rest.column_dot(dd, d), into=p)
            del d, dd
            sums = ops.geglu.geglu_backward_(dp, gu, c)
            dh, of_into = self._gradients(into, gu, h[rows], m_into, sums, into=h[rows])
            ops.norms.rms_backward_(dh, half.x1[rows], norms.mlp_before, eps, dx[rows])
            _add(found, "down", of_down)
            _add(found, "gate_up", of_into)

    def _attend(self, x: Tensor, batch: Batch, tickets: dict[str, Ticket | None] | None) -> _Half:
        shape, norms, ops = self._shape, self._norms, self._pieces
        way, out, into = batch.far if self.far else batch.near, self.groups["o"], self.groups["qkv"]
        h = ops.norms.rms(x, norms.before, shape.eps, into.dtype, into.more)
        qkv = self._kept(tickets, batch, "qkv")
        if qkv is None:
            qkv = self._product(into, h, into.matrix())
        q, k, v = ops.norms.turn(qkv, norms.q, norms.k, way.cos, way.sin, shape.heads, shape.eps)
        o, lse = self._kept(tickets, batch, "attention"), self._kept(tickets, batch, "lse")
        saved_c = None
        if o is None or lse is None:
            self.counts["attention forward"] += 1
            saved = way.attention.forward(q, k, v)
            lse, (o, c) = saved.lse, ops.rest.merge(saved.out, out.bound, out.more)
            saved_c = self._kept(tickets, batch, "c")
            del saved
        else:
            c = self._get(tickets, batch, "c")
        if tickets is not None and not tickets:
            tickets["c"] = Ticket(c, None, None)
        a = self._kept(tickets, batch, "o")
        if a is None:
            a = self._product(out, o, out.matrix())
        elif saved_c is not None:
            a = _rescaled(a, saved_c, c)
        x1 = ops.norms.rms_residual(a, x, norms.after, shape.eps, c)
        return _Half(h, qkv, q, k, v, o, lse, c, a, x1)

    def _product(self, group: Group, x: Tensor, matrix: Tensor, into: Tensor | None = None) -> Tensor:
        self.counts["linear forward"] += len(group.weights)
        return group.forward(x, matrix, into)

    def _gradients(
        self, group: Group, dy: Tensor, x: Tensor, matrix: Tensor, sums: Tensor, *, into: Tensor | None = None
    ) -> tuple[Tensor, list[Gradients | None]]:
        self.counts["linear backward"] += len(group.weights)
        return group.backward(dy, x, matrix, sums, into=into)

    def _tiles(self, tokens: int) -> Iterator[slice]:
        return (slice(start, min(start + self._shape.tile, tokens)) for start in range(0, tokens, self._shape.tile))

    def _keep(self, tickets: dict[str, Ticket | None], batch: Batch, values: Mapping[str, Tensor]) -> None:
        wanted = batch.kept.get(self.number, {})
        for name, value in values.items():
            where = wanted.get("attention" if name == "lse" else name)
            tickets[name] = batch.waiting.put(value, where) if where else None

    def _get(self, tickets: dict[str, Ticket | None] | None, batch: Batch, name: str) -> Tensor:
        found = self._kept(tickets, batch, name)
        assert found is not None
        return found

    @staticmethod
    def _kept(tickets: dict[str, Ticket | None] | None, batch: Batch, name: str) -> Tensor | None:
        ticket = (tickets or {}).get(name)
        return None if ticket is None else batch.waiting.get(ticket)


def _rescaled(kept: Tensor, then: Tensor, now: Tensor) -> Tensor:
    """An output that was kept with c as it was then. The recompute begins with an input of 16 bits, and where a row's norm lies at a
    power of two its c may come out as the neighbour: what meets must have the same."""
    return kept * (now / then)[:, None].to(kept.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _add(found: dict[str, list[Gradients | None]], name: str, more: list[Gradients | None]) -> None:
    """Gradients of a further tile."""
    if name not in found:
        found[name] = more
        return
    for have, new in zip(found[name], more, strict=True):
        for total, part in zip(have or (), new or (), strict=True):
            if total is not None and part is not None:
                total.add_(part)


class Span(torch.autograd.Function):
    """Some layers in one node of autograd's graph: their first input waits, the rest is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[Layer],
        batch: Batch,
        take: Callable[[list[Tensor], list[Tensor]], list[Tensor | None]],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        tickets: list[dict[str, Ticket | None]] = [{} for _ in layers]
        if batch.trains:
            ctx.layers, ctx.batch, ctx.take, ctx.tickets, ctx.parameters = layers, batch, take, tickets, parameters
            ctx.first = batch.waiting.put_residual(x)
        for layer, mine in zip(layers, tickets, strict=True):
            x = layer.run(x, batch, mine if batch.trains else None)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dx is float32 [T, H] and ours alone in this chain, so it is changed in place."""
        dx, layers, batch = grads[0], ctx.layers, ctx.batch
        inputs = [batch.waiting.get(ctx.first)]
        for layer, tickets in zip(layers[:-1], ctx.tickets[:-1], strict=True):
            inputs.append(layer.run(inputs[-1], batch, tickets))
        found: list[list[Tensor]] = []
        for layer, tickets in zip(reversed(layers), reversed(ctx.tickets), strict=True):
            needs_dx = ctx.needs_input_grad[0] or layer is not layers[0]
            for ticket in tickets.values():
                batch.waiting.fetch(ticket)
            found.insert(0, layer.backward(inputs.pop(), dx, batch, tickets, needs_dx))
            tickets.clear()  # gradients take the place of what was kept
        flat = [value for of_layer in found for value in of_layer]
        handed = ctx.take(list(ctx.parameters), flat)
        ctx.tickets = ctx.first = ctx.parameters = None
        return (dx if ctx.needs_input_grad[0] else None, None, None, None, *handed)
