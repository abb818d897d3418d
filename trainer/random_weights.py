"""Random weights in exactly the layout of the hub's gemma-3-12b-it, for machines that cannot download it and for tests.

    python -m trainer.random_weights DIR --size 12b --tokenizer tokenizer.json --device cuda

The layout: config.json of a Gemma3ForConditionalGeneration (text_config and vision_config nested, defaults left out as Google leaves them
out), several bfloat16 shards with an index, text tensors under `language_model.model.`, a SigLIP vision tower and a projector, no
head (it is the embedding). One tensor is in memory at a time.

Matrices are normal with standard deviation 1/sqrt(columns): a unit-norm input stays at unit size, so that activations are finite in
float16. Norm weights are normal with 0.1 around 0 (Gemma multiplies by 1 + w). No value is zero, so that nothing that
gets lost or swapped on the way stays unnoticed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from trainer import cache, progress, tokenizer
from trainer.errors import ConfigError, MachineError, TrainerError
from trainer.gemma3 import SIZES, Shape, Size
from trainer.shards import Bits, Writer, narrowed

VERSION = 1
"""Raised when the same seed gives other bytes."""
NORM_STD = 0.1
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": tokenizer.BOS,
    "eos_token": tokenizer.EOS,
    "pad_token": tokenizer.PAD,
    "unk_token": tokenizer.UNK,
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "model_max_length": 131_072,
}

Draw = Callable[[str, Shape, float], Bits]
"""(name, shape, standard deviation) -> bfloat16 bits."""


class Vision(NamedTuple):
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    image_size: int = 896
    patch_size: int = 14


TINY_VISION = Vision(hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2, image_size=56, patch_size=14)


def write(directory: Path, size: Size, vision: Vision, *, seed: int, device: str = "cpu", shard_bytes: int = 5_000_000_000) -> int:
    """Write config.json, shards and index into an empty directory; returns the bytes of the tensors."""
    (directory / "config.json").write_text(json.dumps(config(size, vision), indent=2) + "\n", encoding="utf-8")
    draw = _cuda(seed) if device == "cuda" else _numpy(seed)
    writer = Writer(directory, shard_bytes)
    wanted = hub_tensors(size, vision)
    try:
        with progress.task("random weights", sum(2 * math.prod(shape) for shape in wanted.values()) / 1e9, "GB") as task:
            for name, shape in wanted.items():
                data = draw(name, shape, _std(name, shape))
                writer.add(name, "BF16", shape, data)
                task.advance(data.nbytes / 1e9)
        writer.finish()
    finally:
        writer.abandon()
    return writer.total_bytes


def hub_tensors(size: Size, vision: Vision) -> dict[str, Shape]:
    """Names and shapes as in the hub's shards."""
    text = {name.replace("model.", "language_model.model.", 1): shape for name, shape in size.tensors().items()}
    wide = vision.hidden_size
    projector: dict[str, Shape] = {
        "multi_modal_projector.mm_input_projection_weight": (wide, size.hidden_size),
        "multi_modal_projector.mm_soft_emb_norm.weight": (wide,),
    }
    return text | projector | {f"vision_tower.vision_model.{name}": shape for name, shape in _vision_tensors(vision).items()}


def _vision_tensors(vision: Vision) -> dict[str, Shape]:
    """SigLIP's, without its pooling head."""
    wide, inner = vision.hidden_size, vision.intermediate_size
    found: dict[str, Shape] = {
        "embeddings.patch_embedding.weight": (wide, 3, vision.patch_size, vision.patch_size),
        "embeddings.patch_embedding.bias": (wide,),
        "embeddings.position_embedding.weight": ((vision.image_size // vision.patch_size) ** 2, wide),
    }
    matrices = {f"self_attn.{name}_proj": (wide, wide) for name in ("q", "k", "v", "out")} | {
        "mlp.fc1": (inner, wide),
        "mlp.fc2": (wide, inner),
    }
    for layer in range(vision.num_layers):
        for name, shape in (matrices | {"layer_norm1": (wide,), "layer_norm2": (wide,)}).items():
            found[f"encoder.layers.{layer}.{name}.weight"] = shape
            found[f"encoder.layers.{layer}.{name}.bias"] = shape[:1]
    return found | {"post_layernorm.weight": (wide,), "post_layernorm.bias": (wide,)}


def config(size: Size, vision: Vision) -> dict[str, Any]:
    """config.json as Google writes it: 12B's text_config leaves out what equals transformers' defaults, and so does this one."""
    text = {key: value for key, value in size.to_config("bfloat16").items() if key not in _LEFT_OUT and _DEFAULTS.get(key) != value}
    if size.sliding_pattern != 6:
        text["sliding_window_pattern"] = size.sliding_pattern
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": min(255_999, size.vocab_size - 3),
        "eoi_token_index": min(256_000, size.vocab_size - 2),
        "eos_token_id": [tokenizer.EOS_ID, tokenizer.END_OF_TURN_ID],
        "image_token_index": min(262_144, size.vocab_size - 1),
        "initializer_range": 0.02,
        "mm_tokens_per_image": min(256, (vision.image_size // vision.patch_size) ** 2),
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "model_type": "siglip_vision_model",
            "num_attention_heads": vision.num_heads,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "vision_use_head": False,
        },
    }


_LEFT_OUT = frozenset(
    {"architectures", "dtype", "sliding_window_pattern", "layer_types", "hidden_activation", "attention_bias"}
    | {"tie_word_embeddings", "pad_token_id", "eos_token_id", "bos_token_id"}
)
_DEFAULTS = {
    "vocab_size": 262_208,
    "head_dim": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
}


def _std(name: str, shape: Shape) -> float:
    if len(shape) == 1:
        return NORM_STD
    if name.endswith("mm_input_projection_weight"):  # Stored [in, out], unlike every other matrix.
        return 1 / math.sqrt(shape[0])
    return 1 / math.sqrt(math.prod(shape[1:]))


def _numpy(seed: int) -> Draw:
    def draw(name: str, shape: Shape, std: float) -> Bits:
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
        values *= std
        values[values == 0] = std
        return narrowed(values)

    return draw


def _cuda(seed: int) -> Draw:
    import torch

    if not torch.cuda.is_available():
        raise MachineError("--device cuda: torch sees no CUDA card here; leave it out, a CPU makes the same layout more slowly")

    def draw(name: str, shape: Shape, std: float) -> Bits:
        generator = torch.Generator("cuda").manual_seed(seed ^ zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(std)
        values[values == 0] = std
        bits: Bits = values.view(torch.int16).cpu().numpy().view(np.uint16)
        return bits

    return draw


def write_tokenizer(directory: Path, made: Tokenizer) -> None:
    """tokenizer.json and the tokenizer_config.json with which AutoTokenizer reads it as it is."""
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.random_weights", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where to write; must not exist yet, or be empty")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or GGUF; without it the embedded model's, tiny has its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda draws 24 GB in seconds")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the embedded model's tokenizer is kept")
    options = parser.parse_args(argv)
    try:
        _make(options)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _make(options: argparse.Namespace) -> None:
    directory, size = options.directory, SIZES[options.size]
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: already there and not empty; name a new directory, or delete it first")
    vision = TINY_VISION if options.size == "tiny" else Vision()
    wanted = hub_tensors(size, vision)
    cache.need_room(directory, 2 * sum(math.prod(shape) for shape in wanted.values()), f"a {options.size} model")
    made = _tokenizer(options)
    partial = directory.with_name(f"{directory.name}.partial")
    if partial.exists():
        raise ConfigError(f"{partial}: left over from an earlier attempt; delete it first")
    partial.mkdir(parents=True)
    try:
        write_tokenizer(partial, made)
        total = write(partial, size, vision, seed=options.seed, device=options.device, shard_bytes=_shard_bytes(size))
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress.say(f"{directory}: {len(wanted)} tensors, {total / 1e9:.3g} GB, {size.num_parameters:,} text parameters")


def _shard_bytes(size: Size) -> int:
    """The hub's 5 GB; a small model still gets several shards."""
    return min(5_000_000_000, max(500_000, size.num_parameters))


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    from trainer.backends import hub, tiny

    if options.tokenizer is not None:
        return tokenizer.from_gguf(options.tokenizer) if options.tokenizer.suffix == ".gguf" else tokenizer.load(options.tokenizer)
    if options.size == "tiny":
        return tiny.tokenizer()
    return tokenizer.load(hub.embedded_tokenizer(options.cache))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
