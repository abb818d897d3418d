"""Every Triton kernel compiles for the cards it may meet, without one: within their shared memory and without matrix products."""

# ruff: noqa: ANN001, ANN201
from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton import language as tl

from tests.trainer.kernels import targets
from tests.trainer.kernels.calls import CALLS, HEADWISE, ROW_WISE, Make
from trainer import gemma3
from trainer.kernels import fused

TOKENS = 70
KINDS = [(75, torch.float16), (80, torch.bfloat16), (90, torch.float16), (90, torch.bfloat16)]
"""Each card with the dtypes that it is used with; float16 on an sm_90 is what the bench's stand-in runs."""


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled anew, so that nothing left over from before can stand for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def built(name: str, size: gemma3.Size, capability: int, dtype: torch.dtype) -> list[Any]:
    """What one function of fused.py has compiled."""
    found: list[Any] = []
    ops = targets.built_for(capability, lambda compiled, grid, values: found.append(compiled))
    CALLS[name](ops, Make(size, TOKENS, dtype))
    return found


def test_every_kernel_has_a_call_here() -> None:
    assert set(fused.kernels()) == {f"{name}_kernel" for name in CALLS}


@pytest.mark.parametrize(("capability", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_kernels_of_12b_compile_without_a_card_and_without_matrix_products(name: str, capability: int, dtype: torch.dtype) -> None:
    found = built(name, gemma3.SIZES["12b"], capability, dtype)
    assert found
    for compiled in found:
        assert list(targets.complaints(compiled, capability)) == []


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, size) for name in ROW_WISE for size in ("270m", "1b", "27b")),
        *((name, size) for name in HEADWISE for size in ("1b", "4b", "27b")),
    ],
)
def test_widths_and_heads_of_the_other_sizes_compile_for_a_t4(name: str, size: str) -> None:
    for compiled in built(name, gemma3.SIZES[size], 75, torch.float16):
        assert list(targets.complaints(compiled, 75)) == []


def test_no_kernel_says_dot() -> None:
    sources = [inspect.getsource(kernel.fn) for kernel in fused.kernels().values()]
    assert all("tl." in source for source in sources)
    assert not [source for source in sources if "dot(" in source]


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(a, b, c, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit  # type: ignore[untyped-decorator]
def double_kernel(a, c, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIDE)
    tl.store(c + at, tl.load(a + at).to(tl.float64) * 1.5)


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_a_matrix_product_would_be_caught(capability: int) -> None:
    """Sentinel."""
    half, wide = torch.zeros(64, 64, dtype=torch.float16), torch.zeros(64, 64)
    compiled = targets.compile_for(product_kernel, {"a": half, "b": half, "c": wide, "SIDE": 64}, capability, {"num_warps": 4})
    assert any("dot" in complaint for complaint in targets.complaints(compiled, capability))


def test_float64_bfloat16_and_too_much_shared_memory_would_be_caught() -> None:
    """Sentinel. Two operands of 256 x 256 float16 are 256 KiB."""
    values = {"a": torch.zeros(64, dtype=torch.bfloat16), "c": torch.zeros(64, dtype=torch.bfloat16), "SIDE": 64}
    found = list(targets.complaints(targets.compile_for(double_kernel, values, 75, {}), 75))
    assert sorted(found) == ["ttir: bf16", "ttir: f64"]
    half, wide = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    large = targets.compile_for(product_kernel, {"a": half, "b": half, "c": wide, "SIDE": 256}, 90, {"num_warps": 8})
    assert any("bytes of shared memory" in complaint for complaint in targets.complaints(large, 90))


def test_an_odd_width_compiles_too() -> None:
    size = replace(gemma3.SIZES["tiny"], hidden_size=3 * 64, intermediate_size=5 * 64)
    for name in ROW_WISE:
        for compiled in built(name, size, 75, torch.float16):
            assert list(targets.complaints(compiled, 75)) == []
