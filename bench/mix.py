"""Records of mixed lengths for bench.qdora_step, and how many kernels and graphs a process has compiled."""

from __future__ import annotations

import gc
import random
import sys
from typing import Any

from trainer.dataset.pack import pack

SHORTEST = 50
MEDIAN = 400
SIGMA = 1.0
SEED = 0
NAME = f"lognormal(median={MEDIAN}, sigma={SIGMA}), at least {SHORTEST}, seed {SEED}"
"""Goes into a row's `mix`; the longest record is its `tokens`."""


def lengths(rows: int, max_tokens: int, *, packed: bool) -> list[int]:
    """Tokens of as many records as fill so many rows: one a row, or packed into at least that many."""
    choose = random.Random(SEED)
    drawn: list[int] = []
    while (len(pack(drawn, max_tokens)) if packed else len(drawn)) < rows:
        drawn += [_length(choose, max_tokens) for _ in range(max(1, rows // 4) if packed else 1)]
    return drawn


def _length(choose: random.Random, max_tokens: int) -> int:
    return min(max_tokens, max(SHORTEST, round(MEDIAN * choose.lognormvariate(0.0, SIGMA))))


def compiled() -> int:
    """Specialisations of Triton kernels that this process holds, from its disk cache or new, and graphs of torch.compile."""
    return triton_entries() + dynamo_graphs()


def triton_entries() -> int:
    return sum(len(caches[0]) for function in jit_functions() for caches in function.device_caches.values())


def jit_functions() -> list[Any]:
    """Every Triton kernel that is defined in this process, anybody's."""
    if "triton.runtime.jit" not in sys.modules:
        return []
    kind: Any = sys.modules["triton.runtime.jit"].JITFunction
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


def dynamo_graphs() -> int:
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
