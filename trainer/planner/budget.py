"""Bytes of a training step, term by term, for the stock code that trains today: bitsandbytes NF4, PEFT's DoRA, SDPA.

Some bytes stand through the whole step: weights, adapter, gradients, optimizer state, checkpoints. On top of them come
moments that exclude each other, and only the highest counts:

    attention   backward of one layer's attention: what its recompute kept, and the scores
    mlp         the last linear of one layer's recompute: everything the layer keeps, and what PEFT builds for DoRA's norms
    loss        logits and their gradient

Counted from shapes, then held against measured peaks of Gemma 3 12B at rank 64 (tests/trainer/planner/test_budget.py has
them with their sources); off by less than 4 %. Legend: T tokens of a forward pass, h hidden, i intermediate, q and kv the
widths of the query and key projections, r rank, L layers, V vocabulary. 1 GB = 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trainer.config import Config
from trainer.gemma3 import Size

NF4_BLOCK = 64
"""Weights that share one absmax."""
ABSMAX_BLOCK = 256
"""Absmax values that share one float32 when they are quantised themselves."""
STATE_BLOCK = 256
"""Values of 8-bit optimizer state that share one float32."""
SCORES_ALIVE = 4
"""Float32 score matrices that the MATH kernel's backward holds at once: P, dP, dS and a product."""
CONTEXT_BYTES = 228_000_000
"""CUDA context and cuBLAS workspaces: what lies between a T4's 15,095 MiB and the 15.6e9 bytes that a process may use of them."""
LOSS_ROWS = 128
"""Rows of logits that exist at once (trainer/kernels/loss.py)."""
SLACK = 0.43
"""Reserved but unused, as a share of the moment: 18.2 GB were reserved where 15.8 were allocated, 5.6 of them the moment's."""
LIBRARIES_BYTES = 900_000_000
"""Resident size of Python with torch, transformers and PEFT imported, on a CPU."""


class Budget(NamedTuple):
    """terms: bytes a term at the highest moment, in reading order; aside: lower moments' own bytes, for the curious."""

    terms: Mapping[str, int]
    moment: str
    aside: Mapping[str, int]

    @property
    def needed_bytes(self) -> int:
        return sum(self.terms.values())


def budget(cfg: Config, size: Size) -> Budget:
    """What a step of `cfg` needs at its peak, on the card or, with model.device = "cpu", in the machine's memory."""
    standing = {**weights(cfg, size), **adapter(cfg, size), "checkpoints": checkpoints_bytes(cfg, size)}
    moments = {"attention": attention_moment(cfg, size), "mlp": mlp_moment(cfg, size), "loss": {"logits and loss": loss_bytes(cfg, size)}}
    highest = max(moments, key=lambda name: sum(moments[name].values()))
    terms = standing | moments[highest] | _surroundings(cfg, sum(moments[highest].values()))
    aside = {name: sum(parts.values()) for name, parts in moments.items() if name != highest}
    return Budget({name: num for name, num in terms.items() if num}, highest, aside)


def tokens(cfg: Config) -> int:
    """T: one row of data.max_tokens at least, more where short records are batched, but not beyond what a step is to see."""
    return max(cfg.data.max_tokens, min(cfg.train.batch_records * cfg.data.max_tokens, cfg.train.tokens_per_step))


def weights(cfg: Config, size: Size) -> dict[str, int]:
    """The frozen model, text part only, the head tied to the embedding.

    codes: half a byte a weight of the linears. absmax: per 64 weights 4 bytes, or 1 and a float32 per 256 of them (QLoRA,
    arXiv 2305.14314, section 3). embedding: V h in model.dtype. norms: float32.
    """
    num = size.num_linear_parameters
    blocks = num // NF4_BLOCK
    return {
        "weights, NF4 codes": num // 2,
        "weights, block scales": blocks + 4 * blocks // ABSMAX_BLOCK if cfg.model.double_quant else 4 * blocks,
        "embedding": size.vocab_size * size.hidden_size * _narrow(cfg),
        "norms": 4 * (size.num_layers * sum(size.norms().values()) + size.hidden_size),
    }


def adapter(cfg: Config, size: Size) -> dict[str, int]:
    """A [r, in], B [out, r] and DoRA's m [out] of every target, their gradients, and Adam's two moments; float32.

    adamw8bit keeps two bytes a parameter and a float32 per 256 values of each moment, for tensors of 4096 values and more.
    """
    matrices, magnitudes = num_trainable(cfg, size)
    num = matrices + magnitudes
    small = 8 * magnitudes
    state = 2 * matrices + 2 * 4 * matrices // STATE_BLOCK + small if cfg.train.optimizer == "adamw8bit" else 8 * num
    return {"adapter": 4 * num, "gradients": 4 * num, "optimizer state": state}


def num_trainable(cfg: Config, size: Size) -> tuple[int, int]:
    """Values in all A and B, and in all m."""
    shapes = [shape for name, shape in size.linears().items() if name in cfg.adapter.targets]
    matrices = cfg.adapter.rank * sum(out + into for out, into in shapes)
    magnitudes = sum(out for out, _ in shapes) if cfg.adapter.dora else 0
    return size.num_layers * matrices, size.num_layers * magnitudes


def checkpoints_bytes(cfg: Config, size: Size) -> int:
    """Inputs of the layers, T h each: L of them, or one on its way where unsloth moves them to the host."""
    kept = 1 if cfg.model.backend == "unsloth" else size.num_layers
    return kept * tokens(cfg) * size.hidden_size * _wide(cfg) if cfg.train.gradient_checkpointing else 0


def attention_moment(cfg: Config, size: Size) -> dict[str, int]:
    """Backward of the attention of one layer: its tensors, the gradients of hidden, output, q and the repeated k and v, and the scores."""
    wide, q = _wide(cfg), size.query_size
    gradients = tokens(cfg) * wide * (size.hidden_size + 4 * q)
    layer = _attention_kept(cfg, size) + _largest_dequantised(size) + gradients
    return {"layer in recompute": layer, "attention scores": SCORES_ALIVE * scores_bytes(cfg, size), **_other_layers(cfg, size)}


def mlp_moment(cfg: Config, size: Size) -> dict[str, int]:
    """The end of one layer's recompute: all that the layer keeps, its attention's P, and PEFT's temporaries or the MLP's gradients."""
    layer = _attention_kept(cfg, size) + _mlp_kept(cfg, size) + _largest_dequantised(size)
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
    hidden = 2 * tokens(cfg) * size.hidden_size * _wide(cfg)
    chunk = LOSS_ROWS * size.vocab_size * (4 if _narrow(cfg) == 4 else 8)
    return hidden + chunk


def _attention_kept(cfg: Config, size: Size) -> int:
    """input, normed input and residual; q, k, v as they come, normed and turned; k and v repeated to all heads; output; DoRA's two copies."""
    wide, h = _wide(cfg), size.hidden_size
    q, kv = size.query_size, size.kv_size
    dora = 2 * 2 * (q + 2 * kv + h) if cfg.adapter.dora else 0
    return tokens(cfg) * (2 * wide * h + 2 * h + 2 * (q + 2 * kv) + wide * (q + 2 * kv) + 2 * wide * q + wide * q + dora)


def _mlp_kept(cfg: Config, size: Size) -> int:
    """normed input and residual; gate, up, gelu(gate) and their product in 16 bit; DoRA's two copies."""
    i, h = size.intermediate_size, size.hidden_size
    dora = 2 * 2 * (2 * i + h) if cfg.adapter.dora else 0
    return tokens(cfg) * ((_wide(cfg) + 2) * h + 4 * 2 * i + dora)


def _other_layers(cfg: Config, size: Size) -> dict[str, int]:
    """Without checkpointing every other layer keeps what the one at work keeps."""
    if cfg.train.gradient_checkpointing:
        return {}
    kept = _attention_kept(cfg, size) + _mlp_kept(cfg, size) + scores_bytes(cfg, size)
    return {"the other layers' activations": (size.num_layers - 1) * kept}


def _largest_dequantised(size: Size) -> int:
    """One linear's weight in 16 bit, on its way into a matrix product."""
    return 2 * max(out * into for out, into in size.linears().values())


def _narrow(cfg: Config) -> int:
    """Bytes of a value in model.dtype."""
    return 4 if cfg.model.dtype == "float32" else 2


def _wide(cfg: Config) -> int:
    """Bytes of the residual stream and of attention: float32 under float16, whose range Gemma 3 leaves."""
    return 2 if cfg.model.dtype == "bfloat16" else 4


def _surroundings(cfg: Config, moment_bytes: int) -> dict[str, int]:
    if cfg.model.device == "cpu":
        return {"Python and its libraries": LIBRARIES_BYTES}
    return {"allocator's slack": round(SLACK * moment_bytes), "CUDA context": CONTEXT_BYTES}
