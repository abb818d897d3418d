"""The moments of a step in the stock code: bitsandbytes NF4, PEFT's DoRA, SDPA.

    attention   backward of one layer's attention: what its recompute kept, and the scores
    mlp         the last linear of one layer's recompute: everything the layer keeps, and what PEFT builds for DoRA's norms
    loss        logits and their gradient

Counted from shapes, then held against measured peaks of Gemma 3 12B at rank 64 (tests/trainer/planner/test_budget.py has
them with their sources); off by less than 4 %. The legend stands in standing.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner.standing import LOSS_ROWS, adapter, largest_dequantised, narrow_bytes, tokens, weights, wide_bytes

SCORES_ALIVE = 4
"""Float32 score matrices that the MATH kernel's backward holds at once: P, dP, dS and a product."""
SLACK = 0.43
"""Reserved but unused, as a share of the moment: 18.2 GB were reserved where 15.8 were allocated, 5.6 of them the moment's."""


def standing(cfg: Config, size: Size) -> dict[str, int]:
    """Bytes a term of what stands through the whole step."""
    return {**weights(cfg, size), **adapter(cfg, size), "checkpoints": checkpoints_bytes(cfg, size)}


def moments(cfg: Config, size: Size) -> dict[str, Mapping[str, int]]:
    """Bytes a term of each moment; they exclude each other."""
    return {
        "attention": attention_moment(cfg, size),
        "mlp": mlp_moment(cfg, size),
        "loss": {"logits and loss": loss_bytes(cfg, size)},
    }


def slack_bytes(moment: Mapping[str, int]) -> int:
    return round(SLACK * sum(moment.values()))


def checkpoints_bytes(cfg: Config, size: Size) -> int:
    """Inputs of the layers, T h each: L of them, or one on its way where unsloth moves them to the host."""
    kept = 1 if cfg.model.backend == "unsloth" else size.num_layers
    return kept * tokens(cfg) * size.hidden_size * wide_bytes(cfg) if cfg.train.gradient_checkpointing else 0


def attention_moment(cfg: Config, size: Size) -> dict[str, int]:
    """Backward of the attention of one layer: its tensors, the gradients of hidden, output, q and the repeated k and v, and the scores."""
    wide, q = wide_bytes(cfg), size.query_size
    gradients = tokens(cfg) * wide * (size.hidden_size + 4 * q)
    layer = _attention_kept(cfg, size) + largest_dequantised(size) + gradients
    return {"layer in recompute": layer, "attention scores": SCORES_ALIVE * scores_bytes(cfg, size), **_other_layers(cfg, size)}


def mlp_moment(cfg: Config, size: Size) -> dict[str, int]:
    """The end of one layer's recompute: all that the layer keeps, its attention's P, and PEFT's temporaries or the MLP's gradients."""
    layer = _attention_kept(cfg, size) + _mlp_kept(cfg, size) + largest_dequantised(size)
    gradients = 3 * 2 * tokens(cfg) * size.intermediate_size
    norms = dora_norm_bytes(cfg, size)
    terms = {"layer in recompute": layer + (0 if norms > gradients else gradients), "attention scores": scores_bytes(cfg, size)}
    return terms | ({"DoRA's norms in PEFT": norms} if norms > gradients else {}) | _other_layers(cfg, size)


def scores_bytes(cfg: Config, size: Size) -> int:
    """One float32 score matrix: heads T S, S at most data.max_tokens. bfloat16 runs a kernel that keeps none.

    A float32 SDPA with a mask and enable_gqa falls to the MATH kernel, and that is what float16 Gemma 3 does today.
    """
    if cfg.model.dtype == "bfloat16":
        return 0
    return 4 * size.num_heads * tokens(cfg) * cfg.data.max_tokens


def dora_norm_bytes(cfg: Config, size: Size) -> int:
    """What PEFT 0.21 builds in every forward pass to take norms of W + s B A: eye(in), B A, W (16 bit and float32), s B A and the sum."""
    if not cfg.adapter.dora:
        return 0
    return max(4 * into * into + (4 * 4 + 2) * out * into for out, into in size.linears().values())


def loss_bytes(cfg: Config, size: Size) -> int:
    """The chunked loss: the last hidden states and their gradient, T h each; LOSS_ROWS rows of logits, float32 and in both directions in 16 bit."""
    hidden = 2 * tokens(cfg) * size.hidden_size * wide_bytes(cfg)
    chunk = LOSS_ROWS * size.vocab_size * (4 if narrow_bytes(cfg) == 4 else 8)
    return hidden + chunk


def _attention_kept(cfg: Config, size: Size) -> int:
    """input, normed input and residual; q, k, v as they come, normed and turned; k and v repeated to all heads; output; DoRA's two copies."""
    wide, h = wide_bytes(cfg), size.hidden_size
    q, kv = size.query_size, size.kv_size
    dora = 2 * 2 * (q + 2 * kv + h) if cfg.adapter.dora else 0
    return tokens(cfg) * (2 * wide * h + 2 * h + 2 * (q + 2 * kv) + wide * (q + 2 * kv) + 2 * wide * q + wide * q + dora)


def _mlp_kept(cfg: Config, size: Size) -> int:
    """normed input and residual; gate, up, gelu(gate) and their product in 16 bit; DoRA's two copies."""
    i, h = size.intermediate_size, size.hidden_size
    dora = 2 * 2 * (2 * i + h) if cfg.adapter.dora else 0
    return tokens(cfg) * ((wide_bytes(cfg) + 2) * h + 4 * 2 * i + dora)


def _other_layers(cfg: Config, size: Size) -> dict[str, int]:
    """Without checkpointing every other layer keeps what the one at work keeps."""
    if cfg.train.gradient_checkpointing:
        return {}
    kept = _attention_kept(cfg, size) + _mlp_kept(cfg, size) + scores_bytes(cfg, size)
    return {"the other layers' activations": (size.num_layers - 1) * kept}
