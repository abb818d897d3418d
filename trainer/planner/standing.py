"""What stands on the card through a whole step, whoever computes it, and the widths that all moments are counted in.

Legend of this room: T tokens of a forward pass, h hidden, i intermediate, q and kv the widths of the query and key
projections, r rank, L layers, V vocabulary. 1 GB = 1e9 bytes.
"""

from __future__ import annotations

from trainer.config import Config
from trainer.gemma3 import Size

NF4_BLOCK = 64
"""Weights that share one absmax."""
ABSMAX_BLOCK = 256
"""Absmax values that share one float32 when they are quantised themselves."""
STATE_BLOCK = 256
"""Values of 8-bit optimizer state that share one float32."""
LEAST_TOKENS = 32
"""No record is shorter, with its turn markers."""
LOSS_ROWS = 128
"""Rows of logits that exist at once (trainer/kernels/loss.py)."""


def tokens(cfg: Config) -> int:
    """T: the rows of a batch behind each other where they are packed, as our layer always has them; else one row of data.max_tokens at
    least, more where short records are batched, but not beyond what a step is to see."""
    if cfg.pack.enabled or cfg.kernels.layer == "ours":
        return cfg.train.batch_records * cfg.data.max_tokens
    return max(cfg.data.max_tokens, min(cfg.train.batch_records * cfg.data.max_tokens, cfg.train.tokens_per_step))


def accumulates(cfg: Config) -> bool:
    """Whether a step has several passes. Records that are not packed may be as short as they like, so that only a step of fewer tokens than
    any record has is surely one pass; packed rows are full but for a few hundredths."""
    row = tokens(cfg) if cfg.pack.enabled else LEAST_TOKENS
    return round(cfg.train.tokens_per_step / row) > 1


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
        "embedding": size.vocab_size * size.hidden_size * narrow_bytes(cfg),
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


def gradients_bytes(cfg: Config, size: Size) -> int:
    """Of the whole adapter, float32; as much as the adapter itself."""
    return 4 * sum(num_trainable(cfg, size))


def largest_dequantised(size: Size) -> int:
    """One linear's weight in 16 bit, on its way into a matrix product."""
    return 2 * max(out * into for out, into in size.linears().values())


def narrow_bytes(cfg: Config) -> int:
    """Bytes of a value in model.dtype."""
    return 4 if cfg.model.dtype == "float32" else 2


def wide_bytes(cfg: Config) -> int:
    """Bytes of the residual stream and of attention: float32 under float16, whose range Gemma 3 leaves."""
    return 2 if cfg.model.dtype == "bfloat16" else 4
