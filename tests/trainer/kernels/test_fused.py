"""Triton's functions against plain.py's on the card: as compiled for it, and from the sm_75 code that a T4 gets."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
from tests.trainer.kernels import targets
from tests.trainer.kernels.calls import CALLS, EXACT, Make, errors
from trainer import gemma3
from trainer.kernels import fused, plain

pytestmark = pytest.mark.gpu
TOKENS = 70
SIZES = ["12b", "27b", "1b"]


@pytest.fixture(scope="session")
def of_a_t4() -> ModuleType:
    """fused.py whose kernels are sm_75 PTX, which the driver makes run on newer cards."""
    return targets.built_for(75, targets.Driver())


def compare(name: str, ops: ModuleType, size: str, dtype: torch.dtype) -> None:
    found, wanted = (CALLS[name](which, Make(gemma3.SIZES[size], TOKENS, dtype, "cuda")) for which in (ops, plain))
    torch.cuda.synchronize()
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in wanted)
    if name in EXACT:
        assert all(torch.equal(have, want) for have, want in zip(found, wanted, strict=True))
    assert max(errors(found, wanted)) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CALLS)
def test_triton_computes_what_plain_torch_does(name: str, size: str, dtype: torch.dtype) -> None:
    compare(name, fused, size, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CALLS)
def test_so_does_the_code_of_a_t4(of_a_t4: ModuleType, name: str, size: str) -> None:
    compare(name, of_a_t4, size, torch.float16)


def test_a_kernel_that_runs_with_another_factor_would_show(of_a_t4: ModuleType) -> None:
    """Sentinel: the same inputs with eps a hundredth of the mean square."""
    make = Make(gemma3.SIZES["12b"], TOKENS, torch.float16, "cuda")
    x, w = make.wide(TOKENS, 3840), make.normal(3840)
    assert max(errors((of_a_t4.rms(x, w, 0.01, x.dtype),), (plain.rms(x, w, 1e-6, x.dtype),))) > 10
    assert max(errors((of_a_t4.rms(x, w, 1e-6, x.dtype),), (plain.rms(x, w, 1e-6, x.dtype),))) <= 1


def test_repeating_a_call_repeats_every_bit() -> None:
    for name, call in CALLS.items():
        first, second = (call(fused, Make(gemma3.SIZES["12b"], TOKENS, torch.float16, "cuda")) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name
