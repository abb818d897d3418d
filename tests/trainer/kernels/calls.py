"""Every function of plain.py and fused.py called with random inputs of one size of Gemma, for comparisons and for compilers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from trainer import gemma3
from trainer.kernels.nf4 import Nested, Nf4

EPS, MORE = 1e-6, 64
"""MORE: columns behind a result that its function leaves unwritten."""
Call = Callable[[ModuleType, "Make"], tuple[Tensor, ...]]


class Make:
    """Seeded inputs: made on the CPU, so that they are the same on every device."""

    def __init__(self, size: gemma3.Size, tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 5) -> None:
        self.size, self.tokens, self.dtype, self.device = size, tokens, dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def heads(self) -> tuple[int, int]:
        return self.size.num_kv_heads, self.size.num_heads // self.size.num_kv_heads

    def normal(self, *shape: int, spread: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * spread).to(self.device, dtype or self.dtype)

    def wide(self, *shape: int, spread: float = 1.0) -> Tensor:
        return self.normal(*shape, spread=spread, dtype=torch.float32)

    def whole(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self._generator).to(self.device)

    def powers(self) -> Tensor:
        """[T]: c of each row, 1 to 1/8."""
        return torch.exp2(-self.whole(4, self.tokens).float())

    def rotation(self) -> tuple[Tensor, Tensor]:
        angle = self.wide(self.tokens, self.size.head_dim // 2, spread=3.0)
        return angle.cos(), angle.sin()

    def nf4(self, rows: int, columns: int, *, nested: bool) -> Nf4:
        codes = self.whole(256, rows * columns // 2).to(torch.uint8)
        table = self.wide(16, spread=0.5)
        blocks = rows * columns // 64
        if not nested:
            return Nf4((rows, columns), codes, self.wide(blocks).abs(), table, None)
        more = Nested(self.wide(256), self.wide(-(-blocks // 256), spread=0.01).abs(), self.wide(1)[0].abs())
        return Nf4((rows, columns), codes, self.whole(256, blocks).to(torch.uint8), table, more)


def _dequantize(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    """All four kinds, rows of this size's hidden width; 5 rows, so that the last program is not full."""
    rows, columns = 5, make.size.hidden_size
    outs = []
    for nested in (False, True):
        for gain in (None, make.wide(rows)):
            outs.append(torch.empty(rows, columns + MORE, dtype=make.dtype, device=make.device)[:, :columns])
            ops.dequantize(make.nf4(rows, columns, nested=nested), gain, outs[-1])
    return tuple(outs)


def _rms(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    hidden = make.size.hidden_size
    return (ops.rms(make.wide(make.tokens, hidden, spread=30), make.normal(hidden), EPS, make.dtype, MORE)[:, :hidden],)


def _rms_backward(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    shape = (make.tokens, make.size.hidden_size)
    dx = make.wide(*shape)
    ops.rms_backward_(make.normal(shape[0], shape[1] + MORE)[:, : shape[1]], make.wide(*shape), make.normal(shape[1]), EPS, dx)
    return (dx,)


def _rms_residual(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    shape = (make.tokens, make.size.hidden_size)
    return (ops.rms_residual(make.normal(*shape), make.wide(*shape), make.normal(shape[1]), EPS, make.powers()),)


def _rms_residual_backward(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    shape = (make.tokens, make.size.hidden_size)
    found = ops.rms_residual_backward(make.wide(*shape), make.normal(*shape), make.normal(shape[1]), EPS, make.powers(), MORE)
    return (found[:, : shape[1]],)


def _turn(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    (kv, group), wide = make.heads, make.size.head_dim
    qkv = make.normal(make.tokens, kv * (group + 2) * wide)
    return tuple(ops.turn(qkv, make.normal(wide), make.normal(wide), *make.rotation(), (kv, group), EPS))


def _turn_backward(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    """dK and dV add up in float32 or come in 16 bits, by the attention that made them."""
    (kv, group), wide = make.heads, make.size.head_dim
    outs = []
    for dtype in (torch.float32, make.dtype):
        dq = make.normal(kv, make.tokens, group, wide)
        dk, dv = (make.normal(kv, make.tokens, wide, dtype=dtype) for _ in range(2))
        qkv = make.normal(make.tokens, kv * (group + 2) * wide)
        weights = make.normal(wide), make.normal(wide)
        outs.append(ops.turn_backward(dq, dk, dv, qkv, *weights, *make.rotation(), (kv, group), EPS, MORE)[:, : qkv.shape[1]])
    return tuple(outs)


def _merge(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    """As the two ways of attention leave their output: heads first, and tokens first. Every third row is too large."""
    (kv, group), wide, outs = make.heads, make.size.head_dim, []
    for tokens_first in (False, True):
        o = make.normal(make.tokens, kv, group, wide).transpose(0, 1) if tokens_first else make.normal(kv, make.tokens, group, wide)
        o[:, ::3] *= 100
        found, c = ops.merge(o, make.wide(1)[0].abs() + 40, MORE)
        outs += [found[:, : make.size.query_size], c]
    return tuple(outs)


def _geglu(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    inner = make.size.intermediate_size
    gu = make.normal(make.tokens, 2 * inner + MORE)
    gu[::3] *= 30
    p, c = ops.geglu(gu, make.wide(1)[0].abs() + 4, inner, MORE)
    return p[:, :inner], c


def _geglu_backward(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    inner = make.size.intermediate_size
    gu = make.normal(make.tokens, 2 * inner + MORE)
    sums = ops.geglu_backward_(make.normal(make.tokens, inner + MORE)[:, :inner], gu, make.powers())
    return sums, gu


def _column_dot(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    tokens, hidden = make.tokens, make.size.hidden_size
    return (ops.column_dot(make.normal(tokens, hidden + MORE), make.normal(tokens, hidden)),)


def _pack(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    x = make.wide(make.tokens, make.size.hidden_size, spread=3e-3)
    x[::2, ::7] *= 1e8
    x[3] = 0
    out = torch.empty_like(x, dtype=make.dtype)
    return ops.pack(x, out), out


def _unpack(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    return (ops.unpack(make.normal(make.tokens, make.size.hidden_size), make.powers()),)


def _row_norms(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    """Ranks that are and are not a power of two."""
    rows, outs = make.size.hidden_size + 3, []
    for rank in (16, 24):
        squares = make.wide(rows).square() + 1
        wa, ba, b = (make.wide(rows, rank, spread=0.1) for _ in range(3))
        outs.append(ops.row_norms(squares, wa, ba, b, 0.7))
    return tuple(outs)


def _softmax_share(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    rows, vocabulary = 3, make.size.vocab_size
    logits = make.wide(rows, vocabulary, spread=4)
    logits[1, 7] = 60.0  # all but certain
    targets = make.whole(vocabulary, rows)
    return tuple(ops.softmax_share(logits, targets, 1024.0, make.dtype))


def _regroup(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    tokens, width = make.tokens, make.size.query_size
    return tuple(ops.regroup(make.normal(tokens, width), make.normal(tokens, width + MORE), make.powers(), make.heads))


def _softmax_backward(ops: ModuleType, make: Make) -> tuple[Tensor, ...]:
    """Two heads of three (slices of longer rows), queries t0 .. T, keys from lo, a window of 9."""
    group, t0, lo = make.heads[1], 16, 11
    rows, keys = (make.tokens - t0) * group, make.tokens - lo
    s, dp = make.wide(2, rows, keys, spread=20), make.wide(2, rows, keys)
    lse, delta = ((make.wide(3, make.tokens * group) + 5 * more)[1:, t0 * group :] for more in (1, 0))
    first = (torch.arange(make.tokens) - 8).clamp_min(0).int().to(make.device)
    return tuple(ops.softmax_backward(s, dp, lse, delta, first, 0.06, (t0, lo, group), make.dtype))


CALLS: Mapping[str, Call] = MappingProxyType(
    {
        "dequantize": _dequantize,
        "rms": _rms,
        "rms_backward": _rms_backward,
        "rms_residual": _rms_residual,
        "rms_residual_backward": _rms_residual_backward,
        "turn": _turn,
        "turn_backward": _turn_backward,
        "merge": _merge,
        "geglu": _geglu,
        "geglu_backward": _geglu_backward,
        "column_dot": _column_dot,
        "pack": _pack,
        "unpack": _unpack,
        "row_norms": _row_norms,
        "softmax_share": _softmax_share,
        "regroup": _regroup,
        "softmax_backward": _softmax_backward,
    }
)
"""By the kernel's name without its ending."""
ROW_WISE = ("rms", "rms_backward", "rms_residual", "rms_residual_backward", "merge", "geglu", "pack", "unpack")
"""One program a row: what they hold grows with the row's width."""
HEADWISE = ("turn", "turn_backward", "regroup")
"""One program a head: compiled for its width and for the number of heads."""

EXACT = ("dequantize", "merge", "pack", "unpack")
"""Powers of two and single roundings: the same bits."""


def errors(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    """Largest error of each output over what one rounding to its dtype allows, and 2^-18 of its largest value for sums in another order."""
    made = []
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == want.dtype and have.shape == want.shape
        wide = want.double()
        allowed = torch.finfo(want.dtype).eps * wide.abs() + 2**-18 * wide.abs().max()
        made.append(float(((have.double() - wide).abs() / allowed).nan_to_num(nan=torch.inf).max()))
    return made
