"""attention.py: the dense way against autograd in float64, the banded and the flash way against the dense one, on a card."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.kernels import attention, plain

Answer = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output [T, K G D], dq [K, T, G, D], dk and dv [K, T, D]."""
SCALE = 0.3
LENGTHS = [(40,), (7, 1, 20, 12), (13, 27)]
WINDOWS = [None, 1, 6, 64]


class Given:
    """Random q, k, v and gradient of the scaled output; a power of two a row."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        heads: tuple[int, int] = (2, 3),
        wide: int = 16,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(4)
        (kv, group), tokens = heads, sum(lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.q, self.k, self.v = normal(kv, tokens, group, wide), normal(kv, tokens, wide), normal(kv, tokens, wide)
        self.do = normal(tokens, kv * group * wide)
        self.c = torch.exp2(-(torch.arange(tokens, device=device) % 4).to(torch.promote_types(dtype, torch.float32)))
        self.where = attention.documents([0, *accumulate(lengths)], torch.device(device))


def seen(lengths: tuple[int, ...], window: int | None) -> Tensor:
    """[T, T] as HF masks: causal, the same document, i - j < window."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(len(document))[:, None], torch.arange(len(document))[None]
    allowed = (j <= i) & (document[:, None] == document[None])
    return allowed if window is None else allowed & (i - j < window)


def reference(given: Given, lengths: tuple[int, ...], window: int | None) -> Answer:
    """Autograd of softmax(q k^T) v in float64, heads of k and v repeated; then times c, which do is the gradient of."""
    q, k, v = (value.double().cpu().clone().requires_grad_() for value in (given.q, given.k, given.v))
    scores = torch.einsum("ktgd,ksd->kgts", q, k) * SCALE
    weights = torch.softmax(scores.masked_fill(~seen(lengths, window), -math.inf), -1)
    out = torch.einsum("kgts,ksd->tkgd", weights, v).flatten(1)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), given.do.double().cpu() * given.c.double().cpu()[:, None])
    return out.detach(), dq, dk, dv


def run(kind: Callable[..., Any], given: Given, window: int | None, ops: ModuleType = plain) -> Answer:
    """Forward, the output scaled in place as the layer does it, backward."""
    way = kind(given.where, window, SCALE, ops)
    saved = way.forward(given.q, given.k, given.v)
    out = saved.out.permute(1, 0, 2, 3).flatten(1)
    scaled = torch.cat((out * given.c.to(out.dtype)[:, None], torch.full_like(out[:, :8], torch.nan)), 1)  # the adapter's columns
    return out, *way.backward(given.do, scaled, saved.lse, given.c, given.q, given.k, given.v)


def worst(found: Answer, wanted: Answer) -> float:
    for have, want in zip(found, wanted, strict=True):
        assert have.shape == want.shape
    pairs = [(have.double().cpu(), want.double().cpu()) for have, want in zip(found, wanted, strict=True)]
    return max(float((have - want).abs().max() / want.abs().max().clamp_min(1)) for have, want in pairs)  # a window of 1 has no dq


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_plain_is_autograds_attention(lengths: tuple[int, ...], window: int | None, dtype: torch.dtype) -> None:
    given = Given(lengths, dtype=dtype)
    assert worst(run(attention.Plain, given, window), reference(given, lengths, window)) <= 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_stock_attention_is_the_same(lengths: tuple[int, ...], window: int | None) -> None:
    given = Given(lengths, dtype=torch.float32)
    assert worst(run(attention.Sdpa, given, window), reference(given, lengths, window)) <= 1e-5


@pytest.mark.parametrize("heads", [(1, 4), (4, 1), (8, 2)])
def test_heads_may_be_grouped_in_any_way(heads: tuple[int, int]) -> None:
    given = Given((9, 14), heads)
    assert worst(run(attention.Plain, given, 5), reference(given, (9, 14), 5)) <= 1e-13


def test_a_window_off_by_one_a_lost_boundary_and_a_lost_c_are_seen() -> None:
    """Sentinels."""
    lengths = (13, 27)
    given = Given(lengths)
    found = run(attention.Plain, given, 6)
    assert worst(found, reference(given, lengths, 6)) <= 1e-13
    for other in (reference(given, lengths, 5), reference(given, lengths, 7), reference(given, (40,), 6)):
        assert worst(found, other) > 0.01
    given.c = torch.ones_like(given.c)
    assert worst(found[1:], reference(given, lengths, 6)[1:]) > 0.1  # type: ignore[arg-type]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_first_keys_say_in_one_number_what_the_mask_says(lengths: tuple[int, ...], window: int | None) -> None:
    where = attention.documents([0, *accumulate(lengths)], torch.device("cpu"))
    first, key = attention.first_keys(where, window), torch.arange(sum(lengths))
    assert torch.equal((key[None] >= first[:, None]) & (key[None] <= key[:, None]), seen(lengths, window))
    assert where.tokens == sum(lengths) and where.longest == max(lengths)


@pytest.mark.parametrize("block", [4, 16, 512])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [*LENGTHS, (100,), (1,) * 50, (64, 1, 130, 5)], ids=str)
def test_bands_hold_every_key_that_is_seen_each_query_once_and_little_more(
    lengths: tuple[int, ...], window: int | None, block: int
) -> None:
    starts, mask = [0, *accumulate(lengths)], seen(lengths, window)
    held, next_query = torch.zeros_like(mask), 0
    for t0, t1, lo in attention.bands(starts, window, block):
        assert t0 == next_query and t0 < t1 <= t0 + block and 0 <= lo <= t0
        needed = int(mask[t0].nonzero()[0])
        assert needed - attention.ALIGN < lo <= needed and lo % attention.ALIGN == 0
        held[t0:t1, lo:t1] = True
        next_query = t1
    assert next_query == len(mask) and bool((held >= mask).all())


def test_a_block_of_long_context_reads_a_window_of_keys_only() -> None:
    """What makes 16,384 tokens cost 16 times a window and not 16 squared."""
    bands = list(attention.bands([0, 16384], 1024))
    assert max(t1 - lo for _, t1, lo in bands) <= 1024 + attention.BLOCK_TOKENS + attention.ALIGN


# --- on a card: geometry of 12B, 1B and 27B, documents that end anywhere

ON_CARD = [((8, 2), 256), ((1, 4), 256), ((16, 2), 128), ((4, 2), 256)]
LONG = [(1500,), (700, 1, 64, 735), (1,) * 3 + (1200,)]


def on_card(
    kind: Callable[..., Any], lengths: tuple[int, ...], window: int | None, heads: tuple[int, int], wide: int, dtype: torch.dtype
) -> float:
    from trainer.kernels import fused

    given = Given(lengths, heads, wide, dtype, "cuda")
    given.q *= 0.3
    exact = Given(lengths, heads, wide, torch.float32, "cuda")
    exact.q, exact.k, exact.v, exact.do = (value.float() for value in (given.q, given.k, given.v, given.do))
    return worst(run(kind, given, window, fused), run(attention.Plain, exact, window))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1024, 100])
@pytest.mark.parametrize("lengths", LONG, ids=str)
@pytest.mark.parametrize(("heads", "wide"), ON_CARD)
def test_the_way_of_a_t4_is_the_dense_one(
    heads: tuple[int, int], wide: int, lengths: tuple[int, ...], window: int | None, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16:
        heads = 2, 2  # the same code; a small one will do
    assert on_card(attention.Turing, lengths, window, heads, wide, dtype) <= 8 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1024, 100])
@pytest.mark.parametrize("lengths", LONG, ids=str)
@pytest.mark.parametrize(("heads", "wide"), ON_CARD)
def test_the_way_of_newer_cards_is_the_dense_one(heads: tuple[int, int], wide: int, lengths: tuple[int, ...], window: int | None) -> None:
    assert on_card(attention.Flash, lengths, window, heads, wide, torch.bfloat16) <= 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [attention.Turing, attention.Flash])
def test_on_a_card_a_window_off_by_one_and_a_lost_boundary_are_seen(kind: Callable[..., Any]) -> None:
    """Sentinel: one key of seven, and of a document."""
    from trainer.kernels import fused

    lengths = (40, 160)
    given = Given(lengths, (2, 2), 128, torch.bfloat16, "cuda")
    found, bound = run(kind, given, 7, fused), 10 * torch.finfo(torch.bfloat16).eps
    assert worst(found, run(attention.Plain, given, 7)) < bound
    for other in (6, 8):
        assert worst(found, run(attention.Plain, given, other)) > bound
    given.where = attention.documents([0, 200], torch.device("cuda"))
    assert worst(found, run(attention.Plain, given, 7)) > bound


@pytest.mark.gpu
def test_a_row_of_16384_tokens_holds_no_matrix_of_its_square() -> None:
    from trainer.kernels import fused

    tokens, heads, wide = 16384, (8, 2), 256
    given = Given((tokens,), heads, wide, torch.float16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(attention.Turing, given, 1024, fused)
    inputs = 2 * tokens * wide * heads[0] * heads[1]
    assert (
        torch.cuda.max_memory_allocated() - before <= 8 * inputs + 2 * attention.BAND_BYTES
    )  # 2 bytes of [T, T] alone would be 0.5 GB a head
