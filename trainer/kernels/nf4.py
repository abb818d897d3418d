"""A matrix in bitsandbytes' NF4, as the tensors that a kernel reads.

A weight is table[code] * scale, where 64 consecutive weights of a row share a scale (QLoRA, arXiv 2305.14314, section 3). With double
quantisation a scale is nested_table[number] * nested_scale + offset, 256 scales sharing a nested one. Gemma's widths divide by 64, so a
block never crosses a row, and a factor for a row can be multiplied into the scales: DoRA's g W costs no pass of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.errors import ModelError

BLOCK = 64
NESTED_BLOCK = 256


class Nested(NamedTuple):
    table: Tensor
    """[256] float32."""
    scales: Tensor
    """One float32 for NESTED_BLOCK scales."""
    offset: Tensor
    """Scalar float32."""


class Nf4(NamedTuple):
    shape: tuple[int, int]
    """(O, I)."""
    codes: Tensor
    """[O I / 2] uint8, the even weight in the high half."""
    absmax: Tensor
    """[O I / 64] float32, or uint8 where nested."""
    table: Tensor
    """[16] float32."""
    nested: Nested | None

    def scales(self) -> Tensor:
        """[O I / 64] float32; product and sum are rounded one after the other, as bitsandbytes does."""
        if self.nested is None:
            return self.absmax
        coarse = self.nested.scales.repeat_interleave(NESTED_BLOCK)[: len(self.absmax)]
        return self.nested.table[self.absmax.long()] * coarse + self.nested.offset


def of(weight: Any) -> Nf4:
    """From a Params4bit; shares its memory.

    Raises:
        ModelError: not NF4 in blocks of 64 of whole rows, or with other blocks of double quantisation than 256.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ModelError("a linear is not quantised; kernels read NF4 only: delete the NF4 state in paths.cache, it is made again")
    out, wide = (int(length) for length in state.shape)
    if state.quant_type != "nf4" or state.blocksize != BLOCK or wide % BLOCK:
        raise ModelError(f"{state.quant_type} in blocks of {state.blocksize}, {wide} columns; kernels read NF4 in blocks of {BLOCK} only")
    nested = None
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCK:
            raise ModelError(f"double quantisation in blocks of {state.state2.blocksize}; kernels read blocks of {NESTED_BLOCK} only")
        nested = Nested(state.state2.code, state.state2.absmax, torch.as_tensor(state.offset, device=weight.device))
    return Nf4((out, wide), weight.data.view(torch.uint8).view(-1), state.absmax, state.code, nested)
