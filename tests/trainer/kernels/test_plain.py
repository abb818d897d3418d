"""plain.py against autograd in float64 of the formulas as papers write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.calls import Make
from trainer import gemma3
from trainer.errors import ModelError
from trainer.kernels import nf4, plain

SIZE = gemma3.SIZES["270m"]
TOKENS = 23
EPS = 1e-6
HEADS, WIDE = (2, 3), 16


def made(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the largest value."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def norm(x: Tensor, w: Tensor, eps: float = EPS) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + w)


def tolerance(dtype: torch.dtype) -> float:
    """A rounding to dtype, and sums of some hundred terms in float32 or float64."""
    return max(torch.finfo(dtype).eps, 2**-20 if dtype != torch.float64 else 2**-46)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def residual_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- norms


@DTYPES
def test_rms_is_gemmas_norm(dtype: torch.dtype) -> None:
    x, w = made(TOKENS, 96, seed=1, spread=30), made(96, seed=2)
    found = plain.rms(x.to(residual_of(dtype)), w.to(residual_of(dtype)), EPS, dtype)
    assert found.dtype == dtype and error(found, norm(x, w)) <= tolerance(dtype)
    assert error(found, norm(x, w - 1)) > 10 * tolerance(dtype)  # sentinel: w is an offset from one


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rms_backward_adds_the_norms_gradient_to_the_residuals(dtype: torch.dtype) -> None:
    x, w, dy, before = (made(TOKENS, 96, seed=seed) for seed in (1, 2, 3, 4))
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(norm(leaf, w[0]), leaf, dy)
    dx = before.to(dtype, copy=True)
    plain.rms_backward_(dy.to(dtype), x.to(dtype), w[0].to(dtype), EPS, dx)
    assert error(dx, before + wanted) <= 4 * tolerance(dtype)
    without_mean = before + dy * (1 + w[0]) / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
    assert error(dx, without_mean) > 40 * tolerance(dtype)  # sentinel: the norm's own derivative is part of it


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_a_scaled_branch_gives_the_same_residual_and_gradient_to_the_bit_of_a_power_of_two(spread: float) -> None:
    """eps is scaled by c^2; at a branch of size 1e-3 an unscaled eps would be as large as the mean square."""
    a, x, w, dx = (made(TOKENS, 96, seed=seed).float() for seed in (1, 2, 3, 4))
    a, w, one = a * spread, w[0], torch.ones(TOKENS)
    c = torch.exp2(-(torch.arange(TOKENS) % 9).float())
    plainly, scaled = plain.rms_residual(a, x, w, EPS, one), plain.rms_residual(a * c[:, None], x, w, EPS, c)
    assert torch.equal(plainly, scaled)
    grad, of_scaled = plain.rms_residual_backward(dx, a, w, EPS, one), plain.rms_residual_backward(dx, a * c[:, None], w, EPS, c)
    assert torch.equal(grad, of_scaled * c[:, None])  # c multiplies what comes out of the branch, so it multiplies the gradient again
    if spread == 1e-3:
        assert error(plain.rms_residual(a * c[:, None], x, w, EPS, one), plainly) > 0.01  # sentinel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_residual_and_gradient_are_those_of_autograd(dtype: torch.dtype) -> None:
    a, x, w, dx = (made(TOKENS, 96, seed=seed) for seed in (1, 2, 3, 4))
    a, c, wide = a.to(dtype).double(), torch.exp2(-(torch.arange(TOKENS) % 4).double()), residual_of(dtype)
    leaf = a.clone().requires_grad_()
    out = x + norm(leaf / c[:, None], w[0])
    (wanted,) = torch.autograd.grad(out, leaf, dx)
    found = plain.rms_residual(a.to(dtype), x.to(wide), w[0].to(wide), EPS, c.to(wide))
    assert error(found, out.detach()) <= tolerance(wide)
    grad = plain.rms_residual_backward(dx.to(wide), a.to(dtype), w[0].to(wide), EPS, c.to(wide))
    assert grad.dtype == dtype and error(grad, wanted) <= tolerance(dtype)


# --- heads


def turned(qkv: Tensor, q_w: Tensor, k_w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [K, T, G, D], k and v [K, T, D], with cos and sin over the whole width and HF's rotate_half."""
    kv, group = HEADS
    heads = qkv.view(TOKENS, kv * (group + 2), WIDE)

    def rotated(x: Tensor) -> Tensor:
        half = torch.cat((-x[..., WIDE // 2 :], x[..., : WIDE // 2]), -1)
        return x * torch.cat((cos, cos), -1)[:, None] + half * torch.cat((sin, sin), -1)[:, None]

    q, k, v = heads.split((kv * group, kv, kv), 1)  # type: ignore[no-untyped-call]
    q, k = rotated(norm(q, q_w)), rotated(norm(k, k_w))
    return q.view(TOKENS, kv, group, WIDE).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def rotation(seed: int = 9) -> tuple[Tensor, Tensor]:
    angle = made(TOKENS, WIDE // 2, seed=seed, spread=3)
    return angle.cos(), angle.sin()


@DTYPES
def test_heads_are_normed_and_turned_as_hf_does(dtype: torch.dtype) -> None:
    qkv, q_w, k_w = made(TOKENS, HEADS[0] * (HEADS[1] + 2) * WIDE, seed=1).to(dtype).double(), made(WIDE, seed=2), made(WIDE, seed=3)
    cos, sin = rotation()
    wide = residual_of(dtype)
    args = [value.to(wide) for value in (q_w, k_w, cos, sin)]
    found = plain.turn(qkv.to(dtype), args[0], args[1], args[2], args[3], HEADS, EPS)
    wanted = turned(qkv, q_w, k_w, cos, sin)
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == dtype and have.is_contiguous() and error(have, want) <= tolerance(dtype)
    assert error(found[0], turned(qkv, q_w, k_w, cos, -sin)[0]) > 10 * tolerance(dtype)  # sentinel: the direction


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gradient_of_the_projections_is_that_of_autograd(dtype: torch.dtype) -> None:
    kv, group = HEADS
    qkv = made(TOKENS, kv * (group + 2) * WIDE, seed=1).to(dtype).double().requires_grad_()
    q_w, k_w, (cos, sin) = made(WIDE, seed=2), made(WIDE, seed=3), rotation()
    dq, dk, dv = [
        made(*shape, seed=seed).to(dtype)
        for seed, shape in ((4, (kv, TOKENS, group, WIDE)), (5, (kv, TOKENS, WIDE)), (6, (kv, TOKENS, WIDE)))
    ]
    (wanted,) = torch.autograd.grad(turned(qkv, q_w, k_w, cos, sin), qkv, [grad.double() for grad in (dq, dk, dv)])
    w_q, w_k, w_cos, w_sin = [value.to(residual_of(dtype)) for value in (q_w, k_w, cos, sin)]
    found = plain.turn_backward(dq, dk, dv, qkv.detach().to(dtype), w_q, w_k, w_cos, w_sin, HEADS, EPS)
    assert found.dtype == dtype and error(found, wanted) <= 2 * tolerance(dtype)
    exchanged = plain.turn_backward(dq, dk, dv, qkv.detach().to(dtype), w_k, w_q, w_cos, w_sin, HEADS, EPS)
    assert error(exchanged, wanted) > 20 * tolerance(dtype)  # sentinel: q's weight is not k's


# --- what enters o and down


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@DTYPES
def test_geglu_is_gelu_by_tanh_times_up(dtype: torch.dtype) -> None:
    gu = made(TOKENS, 2 * 80, seed=1, spread=2).to(dtype)
    found, c = plain.geglu(gu, torch.tensor(1.0), 80)
    gate, up = gu.double().chunk(2, 1)
    assert torch.equal(c, torch.ones_like(c)) and error(found, gelu(gate) * up) <= tolerance(dtype)
    torch.testing.assert_close(gelu(gate), torch.nn.functional.gelu(gate, approximate="tanh"))
    exact = torch.nn.functional.gelu(gate) * up
    assert error(gelu(gate) * up, exact) > 1e-5  # sentinel of the reference: the exact gelu is another function


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gradient_of_geglu_is_that_of_autograd_and_lies_in_its_place(dtype: torch.dtype) -> None:
    gu, dp = made(TOKENS, 2 * 80, seed=1, spread=2).to(dtype), made(TOKENS, 80, seed=2).to(dtype)
    c = torch.exp2(-(torch.arange(TOKENS) % 4).to(residual_of(dtype)))
    leaf = gu.double().clone().requires_grad_()
    gate, up = leaf.chunk(2, 1)
    (wanted,) = torch.autograd.grad(gelu(gate) * up * c.double()[:, None], leaf, dp.double())
    place = gu.clone()
    sums = plain.geglu_backward_(dp, place, c)
    assert error(place, wanted) <= tolerance(dtype)
    assert error(sums, (wanted * gu.double()).sum(0)) <= 4 * tolerance(residual_of(dtype))
    assert error(place, wanted / c.double()[:, None]) > 10 * tolerance(dtype)  # sentinel: c


def test_no_product_of_geglu_or_attention_overflows_float16() -> None:
    """gate * up of 4e7, rows of 12B's down_proj: |row . (c p)| <= SAFE, and every c is a power of two."""
    gu = made(TOKENS, 2 * 80, seed=1, spread=3000).half()
    w = made(50, 80, seed=2)
    bound = w.norm(dim=1).max().float()
    gate, up = gu.double().chunk(2, 1)
    exact = gelu(gate) * up
    assert float(exact.abs().max()) > 65504
    p, c = plain.geglu(gu, bound, 80)
    assert bool(p.isfinite().all()) and float((p.double() @ w.t()).abs().max()) <= plain.SAFE * 1.01
    assert torch.equal(torch.exp2(torch.log2(c).round()), c) and float(c.min()) < 1
    assert error(p / c.double()[:, None], exact) <= 2**-10
    before = gu[:, :80].reshape(TOKENS, 2, 2, 20)
    o, c_o = plain.merge(before.transpose(0, 1), bound)
    assert torch.equal(o.double(), before.flatten(1).double() * c_o.double()[:, None]), "a power of two costs no digit"
    assert float((o.double() @ w.t()).abs().max()) <= plain.SAFE * 1.01


def test_a_row_that_is_safe_keeps_its_bits_and_a_row_of_zeros_its_scale() -> None:
    o = made(1, TOKENS, 1, 80, seed=1).half()
    o[:, 3] = 0
    found, c = plain.merge(o, torch.tensor(10.0))
    assert torch.equal(c, torch.ones(TOKENS)) and torch.equal(found, o[0, :, 0])
    largest = torch.full((1, 1, 1, 64), 500.0)  # its norm is 4000: times 8.192 exactly SAFE
    for bound, wanted in ((8.19, 1.0), (8.2, 0.5), (16.39, 0.25)):
        assert plain.merge(largest, torch.tensor(bound))[1].tolist() == [wanted]


def test_further_columns_are_left_for_the_adapter() -> None:
    """Every function with `more` gives the same in its own columns and makes so many behind them."""
    x, w, c = made(TOKENS, 96, seed=1).float(), made(96, seed=2).float(), torch.ones(TOKENS)
    o, gu = made(2, TOKENS, 3, 16, seed=3).float(), made(TOKENS, 2 * 80, seed=4).float()
    qkv, (cos, sin) = made(TOKENS, 10 * 16, seed=5).float(), (one.float() for one in rotation())
    turned = plain.turn(qkv, w[:16], w[:16], cos, sin, HEADS, EPS)
    calls: list[Callable[[int], Tensor]] = [
        lambda more: plain.rms(x, w, EPS, torch.float32, more),
        lambda more: plain.rms_residual_backward(x, x, w, EPS, c, more),
        lambda more: plain.merge(o, torch.tensor(1.0), more)[0],
        lambda more: plain.geglu(gu, torch.tensor(1.0), 80, more)[0],
        lambda more: plain.turn_backward(*turned, qkv, w[:16], w[:16], cos, sin, HEADS, EPS, more),
    ]
    for call in calls:
        without, with_more = call(0), call(7)
        assert with_more.shape == (TOKENS, without.shape[1] + 7) and torch.equal(with_more[:, :-7], without)
    beside = made(TOKENS, 7, seed=6).float()
    assert torch.equal(plain.geglu(torch.cat((gu, beside), 1), torch.tensor(1.0), 80)[0], plain.geglu(gu, torch.tensor(1.0), 80)[0])
    assert torch.equal(plain.column_dot(torch.cat((x, beside), 1), x), plain.column_dot(x, x))


def test_column_dot_sums_over_tokens() -> None:
    dy, y = made(TOKENS, 40, seed=1).half(), made(TOKENS, 40, seed=2).half()
    assert error(plain.column_dot(dy, y), (dy.double() * y.double()).sum(0)) <= 2**-20


# --- what waits


def test_packed_residuals_keep_eleven_digits_over_a_range_of_two_to_the_28() -> None:
    """A residual stream with channels of 8e5 beside channels of 3e-3."""
    x = made(TOKENS, 96, seed=1).float()
    x[:, ::7] *= 8e5
    x[:, 1::7] *= 3e-3
    x[4] = 0
    x[5] = made(96, seed=3).float() * 1e-20
    packed = torch.empty_like(x, dtype=torch.float16)
    scale = plain.pack(x, packed)
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    largest = packed.float().abs().amax(1)
    rows = x.abs().amax(1) > 0
    assert bool(((largest >= 16384) & (largest <= 32768))[rows].all())
    found = plain.unpack(packed, scale)
    error_of = (found - x).abs()
    ratio = x.abs() / x.abs().amax(1, keepdim=True).clamp_min(1e-30)
    assert bool((error_of <= 2**-11 * x.abs())[ratio >= 2**-28].all()) and bool((ratio[x != 0] >= 2**-28).float().mean() > 0.8)
    assert bool((error_of <= 2**-39 * x.abs().amax(1, keepdim=True))[ratio < 2**-28].all())
    assert torch.equal(found[4], x[4])
    assert bool(x.half().isinf().any()), "sentinel: without a scale it would have overflowed"


# --- attention's pieces


def test_regroup_takes_delta_from_the_scaled_output() -> None:
    """Forward scaled the output by c afterwards: do is the gradient of that, c do that of attention's own output, and delta of it."""
    kv, group = HEADS
    do, o = made(TOKENS, kv * group * WIDE, seed=1), made(TOKENS, kv * group * WIDE, seed=2)
    c = torch.exp2(-(torch.arange(TOKENS) % 4).double())
    grad, delta = plain.regroup(do, o * c[:, None], c, HEADS)
    true_grad = (do * c[:, None]).view(TOKENS, kv, group, WIDE).transpose(0, 1)
    assert torch.equal(grad, true_grad) and grad.is_contiguous()
    assert error(delta, (true_grad * o.view(TOKENS, kv, group, WIDE).transpose(0, 1)).sum(-1)) <= 2**-46


def probabilities(s: Tensor, seen: Tensor, scale: float) -> Tensor:
    return torch.softmax((s * scale).masked_fill(~seen, -math.inf), -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_softmax_backward_is_autograds_under_the_mask(dtype: torch.dtype) -> None:
    group, t0, lo, window, scale = 3, 7, 2, 6, 0.3
    tokens = torch.arange(t0, TOKENS).repeat_interleave(group)
    keys = torch.arange(lo, TOKENS)
    seen = (keys[None] <= tokens[:, None]) & (keys[None] > tokens[:, None] - window)
    s, dp = (made(2, len(tokens), len(keys), seed=seed, spread=3) for seed in (1, 2))
    leaf = s.clone().requires_grad_()
    p = probabilities(leaf, seen, scale)
    (wanted,) = torch.autograd.grad(p, leaf, dp)
    lse = torch.logsumexp((s * scale).masked_fill(~seen, -math.inf), -1)
    delta = (p.detach() * dp).sum(-1)
    first = (torch.arange(TOKENS) - window + 1).clamp_min(0).int()
    wide = residual_of(dtype)

    def found(first: Tensor) -> tuple[Tensor, Tensor]:
        scores, grads, normalisers, deltas = [one.to(wide) for one in (s, dp, lse, delta)]
        return plain.softmax_backward(scores, grads, normalisers, deltas, first, scale, (t0, lo, group), dtype)

    for have, want in zip(found(first), (p.detach(), wanted), strict=True):
        assert have.dtype == dtype and error(have, want) <= 4 * tolerance(dtype)
        assert not bool(have[:, ~seen].any())
    assert error(found((first - 1).clamp_min(0))[0], p.detach()) > 40 * tolerance(dtype)  # sentinel: a window off by one


# --- NF4


def quantized(out: int, wide: int, *, nested: bool) -> tuple[nf4.Nf4, Callable[[torch.dtype], Tensor]]:
    """A random matrix by bitsandbytes, and its own way back."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = made(out, wide, seed=1, spread=0.02).float()
    made_of = __import__("bitsandbytes").nn.Params4bit
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    parameter = made_of(packed, requires_grad=False, quant_state=state, bnb_quantized=True, blocksize=64, quant_type="nf4")

    def back(dtype: torch.dtype) -> Tensor:
        state.dtype = dtype
        return functional.dequantize_4bit(packed, state)  # type: ignore[no-any-return]

    return nf4.of(parameter), back


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(640, 2048), (5, 64), (257, 192)])
def test_nf4_comes_back_as_bitsandbytes_has_it_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    weight, back = quantized(*shape, nested=nested)
    found = torch.empty(shape, dtype=dtype)
    plain.dequantize(weight, None, found)
    assert torch.equal(found, back(dtype))


def test_a_gain_for_each_row_is_one_rounding_away() -> None:
    weight, back = quantized(40, 192, nested=True)
    gain = made(40, seed=4).float()
    wanted = back(torch.float32).double() * gain.double()[:, None]
    found = torch.empty(40, 192, dtype=torch.float16)
    plain.dequantize(weight, gain, found)
    assert bool(((found.double() - wanted).abs() <= 2**-11 * 1.001 * wanted.abs() + 2**-25).all())
    plain.dequantize(weight, gain.roll(1), found)
    assert error(found, wanted) > 0.1  # sentinel: which row a gain belongs to


def test_a_gain_of_one_changes_no_bit() -> None:
    weight, back = quantized(40, 192, nested=True)
    found = torch.empty(40, 192, dtype=torch.float16)
    plain.dequantize(weight, torch.ones(40), found)
    assert torch.equal(found, back(torch.float16))


def test_other_formats_are_refused() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed, state = functional.quantize_4bit(torch.randn(8, 64), blocksize=64, quant_type="fp4")
    with pytest.raises(ModelError, match="fp4"):
        nf4.of(bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="fp4"))


def test_seeded_inputs_are_the_same_on_every_call() -> None:
    assert torch.equal(Make(SIZE, 4, torch.float32).normal(3, 3), Make(SIZE, 4, torch.float32).normal(3, 3))
