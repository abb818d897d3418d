"""Which outputs a step keeps so that its recompute need not make them again, within two budgets of bytes.

The weights are frozen, so no linear needs its input for a gradient of its own: an output that is kept spares the whole
matrix product in the recompute. Per byte of a 16-bit output [T, out] that is 2 T in out / (2 T out) = in FLOPs, so what has
the widest input comes first: `down` (i), then `o` (q) and `qkv`, `gate_up` (h each), in this order at 12B. `attention` (its
output and logsumexp) comes last: what it spares, 2 FLOPs a byte and key that a token sees, depends on how long the documents in a row are.

The training code and the plan both ask `kept`, so that what is planned is what is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from trainer.gemma3 import Size

Name = Literal["down", "o", "qkv", "gate_up", "attention"]
Where = Literal["card", "pinned"]
Kept = dict[int, dict[Name, Where]]
"""By layer; a layer that keeps nothing is not in it."""


ROUND_TOKENS = 64
"""Our layer fills a row up to a multiple of it (trainer/kernels/stack.py)."""
PIECE_BYTES = 4096
"""Each output begins on a multiple of it in pinned memory."""


class Output(NamedTuple):
    """num_bytes: of one layer's output; products: (out, in) of the matrix products that keeping it spares."""

    num_bytes: int
    products: tuple[tuple[int, int], ...]


def outputs(size: Size, tokens: int, rank: int) -> dict[Name, Output]:
    """Every output that can be kept, the one that spares most FLOPs a byte first; 16 bit, logsumexps [T, heads] in float32.

    gate_up is kept in the buffer that later takes dY B of both (2 r columns more), attention in the one with room for X A^T (r).
    """
    of, rows = size.linears(), -(-tokens // ROUND_TOKENS) * ROUND_TOKENS

    def pieces(*num_bytes: int) -> int:
        return sum(-(-num // PIECE_BYTES) * PIECE_BYTES for num in num_bytes)

    def linear(*names: str, more: int = 0) -> Output:
        products = tuple(of[name] for name in names)
        return Output(pieces(2 * rows * (sum(out for out, _ in products) + more)), products)

    linears: dict[Name, Output] = {
        "down": linear("down_proj"),
        "o": linear("o_proj"),
        "qkv": linear("q_proj", "k_proj", "v_proj"),
        "gate_up": linear("gate_proj", "up_proj", more=2 * rank),
    }
    ranked = sorted(linears, key=lambda name: linears[name].products[0][1], reverse=True)
    attention = Output(pieces(2 * rows * (size.query_size + rank), 4 * rows * size.num_heads), ())
    return {**{name: linears[name] for name in ranked}, "attention": attention}


def kept(size: Size, tokens: int, rank: int, keep_bytes: int, keep_pinned_bytes: int) -> Kept:
    """What each layer keeps of a forward pass of `tokens`, and where.

    Output after output in their order, each from the last layer down, as the backward pass needs them: on the card while
    keep_bytes lasts, then in pinned memory while keep_pinned_bytes lasts. The first one that finds no room ends it.
    """
    found: Kept = {}
    places: list[tuple[Where, int]] = [("card", keep_bytes), ("pinned", keep_pinned_bytes)]
    for layer, name, num_bytes in _in_order(size, tokens, rank):
        while places and places[0][1] < num_bytes:
            places.pop(0)
        if not places:
            break
        where, left = places[0]
        places[0] = (where, left - num_bytes)
        found.setdefault(layer, {})[name] = where
    return found


def kept_bytes(size: Size, tokens: int, rank: int, found: Kept, where: Where) -> int:
    """Bytes of all that is kept there."""
    return sum(_layer_bytes(size, tokens, rank, layer, where) for layer in found.values())


def largest_bytes(size: Size, tokens: int, rank: int, found: Kept, where: Where) -> int:
    """Bytes of what the layer that keeps most there keeps."""
    return max((_layer_bytes(size, tokens, rank, layer, where) for layer in found.values()), default=0)


def summary(found: Kept) -> dict[Where, dict[Name, int]]:
    """Number of layers by place and output."""
    counts: dict[Where, dict[Name, int]] = {"card": {}, "pinned": {}}
    for layer in found.values():
        for name, where in layer.items():
            counts[where][name] = counts[where].get(name, 0) + 1
    return counts


def _in_order(size: Size, tokens: int, rank: int) -> Iterator[tuple[int, Name, int]]:
    for name, output in outputs(size, tokens, rank).items():
        yield from ((layer, name, output.num_bytes) for layer in reversed(range(size.num_layers)))


def _layer_bytes(size: Size, tokens: int, rank: int, layer: dict[Name, Where], where: Where) -> int:
    made = outputs(size, tokens, rank)
    return sum(made[name].num_bytes for name, place in layer.items() if place == where)
