"""Which type each tensor of a GGUF gets. A new quantisation is one row in RECIPES.

The mixture is llama.cpp's for a dense model (src/llama-quant.cpp): the embedding, which is the head too, is kept finest,
then attn_v and ffn_down in the first and last eighth of the blocks and in every third between. Where a row does not divide
into 256 a type with blocks of 32 stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from trainer.gguf.names import Tensor


class Recipe(NamedTuple):
    file_type: int
    """general.file_type, what tools show as the file's quantisation."""
    most: Type
    finer: Type
    """Of attn_v and ffn_down where use_more_bits()."""
    embedding: Type


RECIPES: Mapping[str, Recipe] = {
    "q4_k_m": Recipe(LlamaFileType.MOSTLY_Q4_K_M, most=Type.Q4_K, finer=Type.Q6_K, embedding=Type.Q6_K),
}

_STAND_IN = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def use_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def type_of(tensor: Tensor, recipe: Recipe, num_layers: int) -> Type:
    """Type of one tensor: norms stay float32, matrices go by the recipe and then by what their row length allows."""
    if len(tensor.shape) < 2:
        return Type.F32
    if tensor.layer is None:
        wanted = recipe.embedding
    elif tensor.linear in ("v_proj", "down_proj") and use_more_bits(tensor.layer, num_layers):
        wanted = recipe.finer
    else:
        wanted = recipe.most
    return fitting(wanted, tensor.shape[-1])


def fitting(wanted: Type, columns: int) -> Type:
    if columns % 32:
        return Type.F16
    return wanted if columns % 256 == 0 else _STAND_IN[wanted]
