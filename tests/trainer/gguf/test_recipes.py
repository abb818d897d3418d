"""Which type a tensor gets."""

from __future__ import annotations

import pytest
from gguf import GGMLQuantizationType as Type

from trainer.gemma3 import SIZES
from trainer.gguf import names, recipes


@pytest.mark.parametrize(("columns", "kind"), [(3840, Type.Q4_K), (1152, Type.Q5_0), (100, Type.F16)])
def test_a_row_that_does_not_divide_gets_a_stand_in(columns: int, kind: Type) -> None:
    assert recipes.fitting(Type.Q4_K, columns) == kind


def test_the_embedding_of_12b_is_q6_k_and_half_of_its_values_and_downs_are_finer() -> None:
    recipe = recipes.RECIPES["q4_k_m"]
    kinds = {tensor.gguf: recipes.type_of(tensor, recipe, 48) for tensor in names.tensors(SIZES["12b"])}
    assert kinds["token_embd.weight"] == Type.Q6_K and recipe.file_type == 15
    finer = [layer for layer in range(48) if kinds[f"blk.{layer}.ffn_down.weight"] == Type.Q6_K]
    assert finer == [layer for layer in range(48) if kinds[f"blk.{layer}.attn_v.weight"] == Type.Q6_K]
    assert finer == [0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, *range(42, 48)]
    assert kinds["blk.7.attn_q.weight"] == Type.Q4_K and kinds["blk.7.attn_q_norm.weight"] == Type.F32
