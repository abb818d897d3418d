"""What a run needs beside the card: memory of the machine and room on its disks, by stage. All of it estimated from shapes.

Files that are mapped (a GGUF that llama.cpp reads, 16-bit shards) are not counted as memory: the system gives them back.
"""

from __future__ import annotations

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner import ours
from trainer.planner.standing import adapter, gradients_bytes, weights

LIBRARIES_BYTES = 900_000_000
"""Resident size of Python with torch, transformers and PEFT imported, on a CPU. Measured."""
CUDA_LIBRARIES_BYTES = 2_500_000_000
"""The same with CUDA's libraries and unsloth. Assumed, not measured on a T4."""
EXPORT_BLOCK_BYTES = 16 * 2**20
"""A block of weights in float32 (trainer/gguf/write.py)."""
CORES = 2
"""Of the machine that Colab gives with a T4."""
KV_BYTES = 2
"""A value of llama.cpp's cache, float16."""
BATCH_TOKENS, SLOTS = 512, 4
"""Of llama.cpp: rows computed at once, and answers generated at once (trainer/backends/llamacpp.py)."""
BITS = {"most": (4.5, 5.5), "fine": (6.5625, 8.5)}
"""Bits a weight of Q4_K and Q6_K, and of Q5_0 and Q8_0, which take their places where a row does not divide by 256 (ggml-common.h)."""


TOKEN_BYTES = 24
"""A token of a GGUF: its text with a length, a score and a type."""


def memory(cfg: Config, size: Size) -> dict[str, int]:
    """Bytes of the machine's memory by what needs them, at their highest.

    quantise: the largest 16-bit tensor and its copy, once. train: pinned memory, or on a CPU nothing beside the budget. export: the adapter in
    float32, the two matrices at hand and blocks in flight. verify: llama.cpp's cache and the logits of one of its batches.
    """
    libraries = CUDA_LIBRARIES_BYTES if cfg.model.device == "cuda" else LIBRARIES_BYTES
    largest = 4 * max(out * into for out, into in size.linears().values())
    return {
        "quantise": libraries + 2 * 2 * size.vocab_size * size.hidden_size,
        "train": libraries + ours.pinned_bytes(cfg, size),
        "export": libraries + adapter(cfg, size)["adapter"] + 2 * largest + 3 * CORES * EXPORT_BLOCK_BYTES,
        "verify": LIBRARIES_BYTES + cache_bytes(cfg, size) + 4 * BATCH_TOKENS * size.vocab_size,
    }


def cache_bytes(cfg: Config, size: Size) -> int:
    """llama.cpp's keys and values: export.num_ctx tokens in global layers, in local ones a window a slot and a batch."""
    local = min(cfg.export.num_ctx, SLOTS * size.sliding_window + BATCH_TOKENS)
    rows = sum(cfg.export.num_ctx if size.is_global(layer) else local for layer in range(size.num_layers))
    return 2 * KV_BYTES * size.kv_size * rows


def disk(cfg: Config, size: Size, download_bytes: int) -> dict[str, int]:
    """Bytes on disk by what needs them.

    checkpoints: the last checkpoint.keep and one in the making; train also holds the best and the last adapter, and one being written. release: a
    link to the export's file; a copy where the file system has no links.
    """
    return {
        "download": download_bytes,
        "NF4 state": sum(weights(cfg, size).values()),
        "train": (cfg.checkpoint.keep + 1) * checkpoint_bytes(cfg, size) + 3 * gradients_bytes(cfg, size),
        "export": gguf_bytes(size),
    }


def checkpoint_bytes(cfg: Config, size: Size) -> int:
    """One checkpoint: the adapter in float32 and the optimizer's state."""
    parts = adapter(cfg, size)
    return parts["adapter"] + parts["optimizer state"]


def mirror_bytes(cfg: Config, size: Size) -> int:
    """Two slots, each with a checkpoint and the best adapter."""
    return 2 * (checkpoint_bytes(cfg, size) + gradients_bytes(cfg, size))


def gguf_bytes(size: Size) -> int:
    """q4_k_m: the embedding, and attn_v and ffn_down of half of the layers, in Q6_K, the rest in Q4_K; norms in float32, and tokens."""

    def bits(kind: str, out: int, into: int) -> float:
        return BITS[kind][into % 256 != 0] * out * into

    total = bits("fine", size.vocab_size, size.hidden_size)
    for name, (out, into) in size.linears().items():
        most = bits("most", out, into)
        mixed = (most + bits("fine", out, into)) / 2 if name in ("v_proj", "down_proj") else most
        total += size.num_layers * mixed
    return round(total / 8) + 4 * (size.num_layers * sum(size.norms().values()) + size.hidden_size) + TOKEN_BYTES * size.vocab_size
