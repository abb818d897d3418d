"""One size of Gemma 3 as a value: widths, windows, rope, and the name and shape of every tensor that follows from them.

Source: Gemma 3 report, arXiv 2503.19786, sections 2 and table 1; the checkpoints' config.json. Names here are those of the
text-only model (Gemma3ForCausalLM, `model.layers.0...`); `text_name` translates the multimodal checkpoints' prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trainer.errors import ModelError

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# Where checkpoints keep the text model: the hub's multimodal ones, those that newer libraries save again, text-only ones.
_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_HEADS = ("language_model.lm_head.weight", "lm_head.weight")
_NO_TEXT = ("model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Size:
    vocab_size: int
    """Rows of the embedding; 4B and up have 64 more than the tokenizer has ids."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    """Tokens that a local layer sees, itself included."""
    sliding_pattern: int = 6
    """Every so many-th layer is global, the others are local."""
    rope_theta: float = 1_000_000.0
    """Base of the global layers."""
    rope_local_theta: float = 10_000.0
    rope_scaling: float = 1.0
    """Positions of the global layers are divided by it (linear scaling); 1 is none."""
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256.0
    """Scores are divided by its square root; head_dim except in 27B."""
    max_positions: int = 131_072

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def is_global(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_pattern == 0

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's seven matrices, by module name, in the order of the forward pass."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (self.query_size, hidden),
            "k_proj": (self.kv_size, hidden),
            "v_proj": (self.kv_size, hidden),
            "o_proj": (hidden, self.query_size),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    def norms(self) -> dict[str, int]:
        """Width of a layer's RMSNorms, by their name inside the layer."""
        return {
            "input_layernorm": self.hidden_size,
            "self_attn.q_norm": self.head_dim,
            "self_attn.k_norm": self.head_dim,
            "post_attention_layernorm": self.hidden_size,
            "pre_feedforward_layernorm": self.hidden_size,
            "post_feedforward_layernorm": self.hidden_size,
        }

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of the text-only model, in the order of the forward pass. The head is the embedding (tied)."""
        layers = {name: shape for layer in range(self.num_layers) for name, shape in self.layer_tensors(layer).items()}
        return {EMBEDDING: (self.vocab_size, self.hidden_size), **layers, FINAL_NORM: (self.hidden_size,)}

    def layer_tensors(self, layer: int) -> dict[str, Shape]:
        linears: dict[str, Shape] = {linear_name(layer, name): shape for name, shape in self.linears().items()}
        return linears | {f"model.layers.{layer}.{name}.weight": (width,) for name, width in self.norms().items()}

    @property
    def num_linear_parameters(self) -> int:
        return self.num_layers * sum(out * wide for out, wide in self.linears().values())

    @property
    def num_parameters(self) -> int:
        """Of the text model; the tied head counts once."""
        norms = self.num_layers * sum(self.norms().values()) + self.hidden_size
        return self.num_linear_parameters + norms + self.vocab_size * self.hidden_size

    def to_config(self, dtype: str) -> dict[str, Any]:
        """config.json of the text-only model (Gemma3ForCausalLM), with every value written out."""
        linear = None if self.rope_scaling == 1.0 else {"factor": self.rope_scaling, "rope_type": "linear"}
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "dtype": dtype,
            **{theirs: getattr(self, ours) for ours, (theirs, _) in _KEYS.items()},
            "query_pre_attn_scalar": int(self.query_pre_attn_scalar),
            "sliding_window_pattern": self.sliding_pattern,
            "layer_types": ["full_attention" if self.is_global(layer) else "sliding_attention" for layer in range(self.num_layers)],
            "rope_scaling": linear,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": [1, 106],
            "bos_token_id": 2,
        }


# Our field -> (key in config.json, value of a key that a checkpoint leaves out: transformers' Gemma3TextConfig).
_KEYS: Mapping[str, tuple[str, float | None]] = MappingProxyType(
    {
        "vocab_size": ("vocab_size", 262_208),
        "hidden_size": ("hidden_size", None),
        "intermediate_size": ("intermediate_size", None),
        "num_layers": ("num_hidden_layers", None),
        "num_heads": ("num_attention_heads", 8),
        "num_kv_heads": ("num_key_value_heads", 4),
        "head_dim": ("head_dim", 256),
        "sliding_window": ("sliding_window", 4096),
        "rope_theta": ("rope_theta", 1_000_000.0),
        "rope_local_theta": ("rope_local_base_freq", 10_000.0),
        "rms_norm_eps": ("rms_norm_eps", 1e-6),
        "query_pre_attn_scalar": ("query_pre_attn_scalar", 256.0),
        "max_positions": ("max_position_embeddings", 131_072),
    }
)


def _small(hidden_size: int, intermediate_size: int, num_layers: int) -> Size:
    """Text-only sizes: one head of keys and values, short windows, no scaling of positions."""
    return Size(262_144, hidden_size, intermediate_size, num_layers, 4, 1, 256, 512, max_positions=32_768)


def _large(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, head_dim: int, score_scalar: float) -> Size:
    """Multimodal sizes: 64 more embedding rows, two query heads for one of keys and values, long contexts by scaling."""
    return Size(
        vocab_size=262_208,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=head_dim,
        sliding_window=1024,
        rope_scaling=8.0,
        query_pre_attn_scalar=score_scalar,
    )


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "270m": _small(640, 2048, 18),
        "1b": _small(1152, 6912, 26),
        "4b": _large(2560, 10240, 34, 8, 256, 256),
        "12b": _large(3840, 15360, 48, 16, 256, 256),
        "27b": _large(5376, 21504, 62, 32, 128, 168),
        # Two layers for tests, every matrix wide enough for a K-quant's 256 columns; 40 embedding rows without a token.
        "tiny": Size(
            vocab_size=640,
            hidden_size=256,
            intermediate_size=512,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            sliding_window=64,
            query_pre_attn_scalar=64.0,
            max_positions=4096,
        ),
    }
)


def linear_name(layer: int, name: str) -> str:
    """Name of a layer's matrix in the text-only model: `linear_name(3, "q_proj")`."""
    part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{part}.{name}.weight"


def text_name(name: str) -> str | None:
    """The text-only model's name of a checkpoint's tensor; None for vision tensors."""
    if name in _HEADS:
        return HEAD
    if name.startswith(_NO_TEXT):
        return None
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    return None if prefix is None else "model." + name.removeprefix(prefix)


def read(config_json: Path) -> Size:
    """The size that a checkpoint's config.json describes, multimodal (nested text_config) or text-only.

    Raises:
        ModelError: not there, not JSON, not a Gemma 3, or a Gemma 3 that this code does not know how to compute.
    """
    try:
        tree = json.loads(config_json.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{config_json}: not there; a model directory holds config.json, tokenizer.json and *.safetensors") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{config_json}: cannot be read as JSON: {error}; download the model again") from error
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind not in ("gemma3", "gemma3_text"):
        remedy = "set model.name=unsloth/gemma-3-12b-it, or a directory that holds a Gemma 3"
        raise ModelError(f"{config_json}: model_type is {kind!r}; Trinity trains Gemma 3 only: {remedy}")
    text = tree.get("text_config", {}) if kind == "gemma3" else tree
    return _from_text_config(text, config_json)


def _from_text_config(text: Mapping[str, Any], path: Path) -> Size:
    values = {ours: text.get(theirs, default) for ours, (theirs, default) in _KEYS.items()}
    rope = text.get("rope_parameters") or {}
    local, full = rope.get("sliding_attention") or {}, rope.get("full_attention") or {}
    scaling = full if rope else text.get("rope_scaling") or {}
    values["rope_theta"] = full.get("rope_theta", values["rope_theta"])
    values["rope_local_theta"] = local.get("rope_theta", values["rope_local_theta"])
    values["rope_scaling"] = scaling.get("factor", 1.0)
    values["sliding_pattern"] = _pattern(text)
    problems = [
        f"{path}: {_KEYS[name][0]} is {value!r}, not a positive number"
        for name, value in values.items()
        if name in _KEYS and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0)
    ]
    problems += _unknown(text, scaling, path)
    if problems:
        raise ModelError(*problems)
    kinds = {field.name: float if field.type == "float" else int for field in fields(Size)}
    typed: dict[str, Any] = {name: kinds[name](value) for name, value in values.items()}
    size = Size(**typed)
    if (types := text.get("layer_types")) and list(types) != size.to_config("")["layer_types"]:
        raise ModelError(
            f"{path}: layer_types is no repetition of one global layer in {size.sliding_pattern}; this Gemma 3 is not supported"
        )
    return size


def _pattern(text: Mapping[str, Any]) -> int:
    types = text.get("layer_types") or []
    given = text.get("sliding_window_pattern", text.get("_sliding_window_pattern"))
    if isinstance(given, int) and given > 0:
        return given
    return types.index("full_attention") + 1 if "full_attention" in types else 6


def _unknown(text: Mapping[str, Any], scaling: Mapping[str, Any], path: Path) -> list[str]:
    """What Gemma 3's released sizes never have and this code would compute wrongly."""
    problems = []
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "linear"):
        problems.append(f"{path}: rope scaling {scaling.get('rope_type', scaling.get('type'))!r} is not supported; Gemma 3 has linear")
    problems += [
        f"{path}: {key} is {text[key]!r}; Gemma 3's released sizes have none, and this one is not supported"
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "attention_bias", "use_bidirectional_attention")
        if text.get(key)
    ]
    if text.get("tie_word_embeddings") is False:
        problems.append(f"{path}: tie_word_embeddings is false; Gemma 3 ties the head to the embedding")
    return problems


def named(size: Size) -> str | None:
    """The name in SIZES of a size, if it has one."""
    return next((name for name, known in SIZES.items() if asdict(known) == asdict(size)), None)
