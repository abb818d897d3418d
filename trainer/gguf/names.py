"""Which tensors a text-only Gemma 3 has, under the hub's names and under llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import gguf

from trainer.gemma3 import EMBEDDING, FINAL_NORM, Size, linear_name


class Tensor(NamedTuple):
    hf: str
    """Name in the hub's text-only layout."""
    gguf: str
    shape: tuple[int, ...]
    """Rows first, as numpy and safetensors have it; GGUF's tables show it the other way round."""
    layer: int | None = None
    linear: str | None = None
    """`q_proj` ... `down_proj` where an adapter can change the tensor."""


def tensors(size: Size) -> Iterator[Tensor]:
    """Every tensor of the file, in the order in which it is written. The head is tied to the embedding."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, size.num_layers)

    def tensor(hf: str, shape: tuple[int, ...], layer: int | None = None, linear: str | None = None) -> Tensor:
        found = names.get_name(hf, try_suffixes=(".weight",))
        assert found is not None, hf
        return Tensor(hf, found, shape, layer, linear)

    yield tensor(FINAL_NORM, (size.hidden_size,))
    yield tensor(EMBEDDING, (size.vocab_size, size.hidden_size))
    for layer in range(size.num_layers):
        for name, shape in size.linears().items():
            yield tensor(linear_name(layer, name), shape, layer, name)
        for name, width in size.norms().items():
            yield tensor(f"model.layers.{layer}.{name}.weight", (width,))
