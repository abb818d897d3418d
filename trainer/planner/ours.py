"""The moments of a step with our own layer (kernels.layer = "ours"), and what it pins in the host's memory.

Between two layers only a float32 residual [T, h] is alive; each span of `span_layers` layers leaves its input behind, 16 bit with
a scale a row, in pinned memory, and is computed again in its backward. Moments that exclude each other:

    mlp         backward of one layer's MLP, a tile of tokens at a time
    attention   backward of one layer's attention, a block of scores at a time
    loss        LOSS_ROWS rows of logits, the final hidden states and their gradient
    optimizer   the gradients back on the card, where kernels.pin_gradients moved them away

Counted from shapes. The legend stands in standing.py; t = min(T, kernels.mlp_tile_tokens); b the bytes of a value in model.dtype.
Not counted: LoRA's [T, r] products and 16-bit copies of one layer's A and B (below 20 MB at rank 64), and what kernels.norms or
kernels.geglu = "stock" hold beyond ours: these switches are for measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner import keep, stock
from trainer.planner.standing import LOSS_ROWS, adapter, narrow_bytes, num_trainable, tokens, weights

SCORE_BLOCK_BYTES = 256 * 2**20
"""Most that the attention's backward holds of scores and their gradients at once."""
SCORE_BYTES = 12
"""S and dP in float32, P and dS in 16 bit, a score."""
ON_THEIR_WAY = 2
"""Buffers between card and host that are on the card at once: one in use, one in transfer."""
SLACK_SHARE, SLACK_BYTES = 0.06, 300_000_000
"""Reserved but unused: a share of the moment's temporaries, and fragments. A guess, not measured yet."""


def standing(cfg: Config, size: Size) -> dict[str, int]:
    """Weights, adapter, its gradients (of two layers where the others are pinned) and optimizer state.

    DoRA's norm caches: n, |W|^2 and g = m / n in float32, 12 bytes a magnitude.
    """
    terms = {**weights(cfg, size), **adapter(cfg, size), "norm caches": 3 * 4 * num_trainable(cfg, size)[1]}
    if _pins_gradients(cfg):
        terms["gradients"] = ON_THEIR_WAY * terms["gradients"] // size.num_layers
    return terms


def moments(cfg: Config, size: Size) -> dict[str, Mapping[str, int]]:
    """Bytes a term of each moment; they exclude each other."""
    backward = {**held(cfg, size), "residuals": residuals_bytes(cfg, size)}
    found: dict[str, Mapping[str, int]] = {
        "mlp": backward | mlp_moment(cfg, size),
        "attention": backward | attention_moment(cfg, size),
        "loss": {**held(cfg, size), "logits and loss": loss_bytes(cfg, size)},
    }
    return found | ({"optimizer": {"gradients, back for the step": 4 * sum(num_trainable(cfg, size))}} if _pins_gradients(cfg) else {})


def slack_bytes(moment: Mapping[str, int]) -> int:
    """Kept tensors and layer inputs are alike and go back to where they came from: they leave no gaps."""
    alike = ("kept tensors", "layer inputs")
    return SLACK_BYTES + round(SLACK_SHARE * sum(num for name, num in moment.items() if name not in alike))


def pinned(cfg: Config, size: Size) -> dict[str, int]:
    """Bytes a term in the host's pinned memory, as they are asked for. Stock code pins nothing that is ours to plan.

    layer inputs: 2 T h a span. kept tensors: keep.py. gradients: float32, of the whole adapter.
    """
    if not _is_pinning(cfg):
        return {}
    terms = {
        "layer inputs": num_spans(cfg, size) * 2 * tokens(cfg) * size.hidden_size if cfg.kernels.offload == "ours" else 0,
        "kept tensors": keep.kept_bytes(size, tokens(cfg), kept(cfg, size), "pinned"),
        "gradients": 4 * sum(num_trainable(cfg, size)) if cfg.kernels.pin_gradients else 0,
    }
    return {name: num for name, num in terms.items() if num}


def pinned_bytes(cfg: Config, size: Size) -> int:
    return sum(pinned(cfg, size).values())


def kept(cfg: Config, size: Size) -> keep.Kept:
    """What the config's budgets keep; nothing in the stock layer."""
    if cfg.kernels.layer == "stock":
        return {}
    return keep.kept(size, tokens(cfg), cfg.kernels.keep_bytes, cfg.kernels.keep_pinned_bytes)


def num_spans(cfg: Config, size: Size) -> int:
    return math.ceil(size.num_layers / cfg.kernels.span_layers)


def held(cfg: Config, size: Size) -> dict[str, int]:
    """What waits on the card between forward and backward, and what is on its way to or from the host.

    layer inputs: 2 T h in two buffers, or all of them as they are, 4 T h a span, without offload. kept tensors: those of the
    card; of the pinned ones, twice the most that one layer has. A CPU has no other memory: everything counts.
    """
    row, found = tokens(cfg) * size.hidden_size, kept(cfg, size)
    parts = {where: keep.kept_bytes(size, tokens(cfg), found, where) for where in ("card", "pinned")}
    if not _is_pinning(cfg):
        return {"layer inputs": num_spans(cfg, size) * 4 * row, "kept tensors": sum(parts.values())}
    way = ON_THEIR_WAY * keep.largest_bytes(size, tokens(cfg), found, "pinned")
    inputs = {"layer inputs, on their way": ON_THEIR_WAY * 2 * row}
    if cfg.kernels.offload == "stock":
        inputs = {"layer inputs": num_spans(cfg, size) * 4 * row}
    return {**inputs, "kept tensors": parts["card"], "kept tensors, on their way": way}


def residuals_bytes(cfg: Config, size: Size) -> int:
    """Float32 [T, h]: the layer's input x, x1 between attention and MLP, and the gradient dx: 12 T h; 4 T h for each further layer of a span."""
    return (12 + 4 * (cfg.kernels.span_layers - 1)) * tokens(cfg) * size.hidden_size


def mlp_moment(cfg: Config, size: Size) -> dict[str, int]:
    """tile: gate|up 2 b t i, their product b t i; normed input h, output d and their gradients 4 b t h. dequantised: gate|up and down, 3 b h i."""
    b, i, h = narrow_bytes(cfg), size.intermediate_size, size.hidden_size
    tile = min(tokens(cfg), cfg.kernels.mlp_tile_tokens)
    norms = stock.dora_norm_bytes(cfg, size) if cfg.kernels.dora == "stock" else 0
    return {"MLP tile": b * tile * (3 * i + 4 * h), "dequantised weights": b * 3 * h * i, "DoRA's norms in PEFT": norms}


def attention_moment(cfg: Config, size: Size) -> dict[str, int]:
    """Tensors, scores and dequantised q, k, v of one layer.

    tensors: q|k|v and their gradient 2 b T (q + 2 kv); q and k normed and turned b T (q + kv); output, its gradient and that laid
    out by heads 3 b T q; dk and dv summed in float32 8 T kv. scores: a block, or the MATH kernel's matrices with kernels.attention = "stock".
    dequantised: b h (q + 2 kv).
    """
    b, num, q, kv = narrow_bytes(cfg), tokens(cfg), size.query_size, size.kv_size
    tensors = num * (b * (2 * (q + 2 * kv) + (q + kv) + 3 * q) + 2 * 4 * kv)
    scores = min(SCORE_BLOCK_BYTES, SCORE_BYTES * size.num_heads * num * num)
    if cfg.kernels.attention == "stock":
        scores = stock.SCORES_ALIVE * stock.scores_bytes(cfg, size)
    return {"attention tensors": tensors, "attention scores": scores, "dequantised weights": b * size.hidden_size * (q + 2 * kv)}


def loss_bytes(cfg: Config, size: Size) -> int:
    """Final hidden states and their gradient 2 b T h, the float32 residual 4 T h; of LOSS_ROWS rows (all T with kernels.loss = "stock")
    logits in float32 and in both directions in 16 bit, 8 V a row."""
    b = narrow_bytes(cfg)
    rows = LOSS_ROWS if cfg.kernels.loss == "ours" else tokens(cfg)
    return (2 * b + 4) * tokens(cfg) * size.hidden_size + rows * size.vocab_size * (4 if b == 4 else 8)


def _is_pinning(cfg: Config) -> bool:
    return cfg.kernels.layer == "ours" and cfg.model.device == "cuda"


def _pins_gradients(cfg: Config) -> bool:
    return _is_pinning(cfg) and cfg.kernels.pin_gradients
