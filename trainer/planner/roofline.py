"""Seconds from FLOPs and bytes moved. Estimates: a sum of products at a card's sustained rate, nothing of launches and copies."""

from __future__ import annotations

import math
from typing import NamedTuple

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner import host, keep, ours
from trainer.planner.cards import Card
from trainer.planner.standing import num_trainable, tokens, weights

DEQUANTISE_BYTES = 4.5
"""Traffic of one weight on its way into a product: half a byte of code read, 2 bytes written and read again."""
LORA_PASSES = 5
"""Products with A and with B each: forward, recompute, and in the backward P = dY B with dX's part, dA with dB, and X A^T once more."""
ATTENTION_PASSES = 4.5
"""Of the forward's two products: forward, recompute, and five products of the same size in the backward."""


def generation_s(cfg: Config, size: Size, card: Card) -> float:
    """Most time that evaluate generates, s: every answer as long as evaluate.max_new_tokens, and nothing but memory traffic.

    A token of a batch reads all weights; with more than one record bitsandbytes first writes each linear in 16 bit and
    reads it again, 4 bytes a weight. Attention and launches are left out: the true time is longer, answers mostly shorter.
    """
    records, models = (cfg.evaluate.max_records, 2) if cfg.evaluate.exact_match else (cfg.evaluate.reference_records, 1)
    batches = math.ceil(records / cfg.evaluate.batch_records)
    dequantised = 4 * size.num_linear_parameters if cfg.evaluate.batch_records > 1 else 0
    token_s = (sum(weights(cfg, size).values()) + dequantised) / card.bytes_per_s
    return models * batches * cfg.evaluate.max_new_tokens * token_s


class Times(NamedTuple):
    """Seconds by stage, None where nobody knows the card's rate. All of it estimated; `evaluate` and `verify` are upper bounds."""

    download: float
    quantise: float
    load: float
    train: float | None
    evaluate: float | None
    export: float
    verify: float


DOWNLOAD_BYTES_PER_S, DISK_BYTES_PER_S = 50e6, 200e6
"""Assumed of a machine like Colab's."""
QUANTISE_WEIGHTS_PER_S = 15e6
"""Of one thread, into Q4_K. Measured with ggml on the CPU that the demo ran on."""
DATA_BYTES_PER_TOKEN = 4
"""Of a data set's file, its JSON included: rough, and on the slow side."""


def times(cfg: Config, size: Size, card: Card, download_bytes: int, num_tokens: int) -> Times:
    """num_tokens: of an epoch. quantise: the first run's, which reads the 16-bit shards once."""
    load = sum(weights(cfg, size).values()) / DISK_BYTES_PER_S
    pass_s, forward = step_s(cfg, size, card), forward_s(cfg, size, card)
    # base and tuned, each over all records, none longer than a row
    losses = None if forward is None else 2 * cfg.evaluate.max_records * forward
    return Times(
        download=download_bytes / DOWNLOAD_BYTES_PER_S,
        quantise=2 * size.num_parameters / DISK_BYTES_PER_S,
        load=load,
        train=None if pass_s is None else num_passes(cfg, num_tokens) * pass_s,
        evaluate=None if losses is None else load + losses + generation_s(cfg, size, card),
        export=size.num_parameters / (QUANTISE_WEIGHTS_PER_S * host.CORES),
        verify=60 * cfg.verify.minutes,
    )


def num_passes(cfg: Config, num_tokens: int) -> float:
    """Forward and backward passes of a whole training."""
    each_step = max(1, round(cfg.train.tokens_per_step / tokens(cfg)))
    return cfg.train.max_steps * each_step if cfg.train.max_steps else cfg.train.epochs * num_tokens / tokens(cfg)


def forward_s(cfg: Config, size: Size, card: Card) -> float | None:
    """A forward pass of T tokens with its head, s."""
    if cfg.model.device == "cpu" or card.flops_per_s is None:
        return None
    num = tokens(cfg)
    attention = sum(attention_flops(size, num, layer) for layer in range(size.num_layers))
    flops = 2.0 * num * (size.num_linear_parameters + size.vocab_size * size.hidden_size + num_trainable(cfg, size)[0]) + attention
    return flops / card.flops_per_s + DEQUANTISE_BYTES * size.num_linear_parameters / card.bytes_per_s


def step_s(cfg: Config, size: Size, card: Card) -> float | None:
    """A step of T tokens in our layer, accumulation 1, s: step_flops at what the card sustains, and dequantising at its bandwidth.

    None where it cannot be said: the stock layer, or a card whose sustained rate nobody measured.
    """
    if cfg.kernels.layer == "stock" or cfg.model.device == "cpu" or card.flops_per_s is None:
        return None
    dequantised = DEQUANTISE_BYTES * size.num_linear_parameters * (2 + _again(cfg) + (1 if cfg.adapter.dora else 0))
    return sum(step_flops(cfg, size).values()) / card.flops_per_s + dequantised / card.bytes_per_s


def step_flops(cfg: Config, size: Size) -> dict[str, float]:
    """FLOPs by part, 2 a multiply-add; one document of T tokens, every token supervised.

    linears: 2 T in out each, in forward, recompute and dX. spans: all layers of a span but the last run once more, to find
    the inputs of those behind them. kept: what the recompute is spared. head: logits and dL/dh. norms: W A^T, once a step.
    """
    num, rank = tokens(cfg), cfg.adapter.rank
    linears = 2.0 * num * size.num_linear_parameters
    matrices = num_trainable(cfg, size)[0]
    attention = sum(attention_flops(size, num, layer) for layer in range(size.num_layers))
    return {
        "linears": 3 * linears,
        "spans": _again(cfg) * (linears + attention),
        "kept": -kept_flops(cfg, size),
        "head": 2 * 2.0 * num * size.vocab_size * size.hidden_size,
        "LoRA": (LORA_PASSES + _again(cfg)) * 2.0 * num * matrices,
        "attention": ATTENTION_PASSES * attention,
        "norms": 2.0 * rank * size.num_linear_parameters if cfg.adapter.dora else 0.0,
    }


def attention_flops(size: Size, num: int, layer: int) -> float:
    """Forward of one layer's attention over a document of `num` tokens: two products over the pairs of the causal, windowed band."""
    window = num if size.is_global(layer) else min(num, size.sliding_window)
    pairs = num * window - window * window / 2
    return 4.0 * size.query_size * pairs


def kept_flops(cfg: Config, size: Size) -> float:
    """What kept outputs spare: their products in the recompute, and once more in a layer that its span runs twice."""
    num, made = tokens(cfg), keep.outputs(size, tokens(cfg), cfg.adapter.rank)
    total = 0.0
    for layer, names in ours.kept(cfg, size).items():
        last = (layer + 1) % cfg.kernels.span_layers == 0 or layer == size.num_layers - 1
        products = sum(2.0 * num * out * into for name in names for out, into in made[name].products)
        attention = attention_flops(size, num, layer) if "attention" in names else 0.0
        total += (products + attention) * (1 if last else 2)
    return total


def _again(cfg: Config) -> float:
    """Share of the layers that a span computes once more."""
    return (cfg.kernels.span_layers - 1) / cfg.kernels.span_layers
