"""The CUDA kernels of a profiled step: their names, counts and times, and which of them a T4 (sm_75) could not run.

A name shows most of what must not be there, not all of it. It does not show a `tl.dot` inside a Triton kernel of one's own
(inductor's templates do have names); tests/trainer/kernels compile those for sm_75 and read the code. Names of
newer architectures (sm80_xmma, cutlass_80, nvjet) are how cuBLAS does the same float16 product on the stand-in: they are fine.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORBIDDEN: tuple[tuple[str, str], ...] = (
    ("FlashAttention", r"flash"),
    ("cuDNN", r"cudnn"),
    ("bfloat16", r"bf16|bfloat16|nvjet_t[a-z]{2}_"),  # nvjet spells operand, scale and result: hsh is float16, tst bfloat16
    ("TF32", r"tf32|tensorop_s1688gemm"),  # cutlass_75_tensorop_f16_s1688gemm, what a T4 runs, is another one
    ("float16 accumulation", r"[^s]h(884|1688|16816|161616)gemm|hgemm|gemm_f16f16_f16f16_|nvjet_hh[a-z]_"),
    ("tl.dot of inductor's templates", r"triton_tem_|flex_attention"),
)
"""What an sm_75 lacks or the T4 mode forgoes, and the pattern in a kernel's name, whatever its case."""


class Kernel(NamedTuple):
    name: str
    launches: int
    total_us: float


def trace(profiler: Any) -> list[dict[str, Any]]:
    """The events of a finished torch.profiler.profile, as its trace file has them."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
        return events


def collect(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """By name, the longest first. Copies, memsets and annotated ranges have other categories in the trace."""
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("cat") == "kernel":
            count, total = found.get(event["name"], (0, 0.0))
            found[event["name"]] = count + 1, total + float(event["dur"])
    return sorted((Kernel(name, *both) for name, both in found.items()), key=lambda one: -one.total_us)


def seconds(kernels: Iterable[Kernel]) -> float:
    """Their sum: kernels of a step follow each other on one stream and overlap with copies only, which are no kernels."""
    return sum(one.total_us for one in kernels) / 1e6


def forbidden(names: Iterable[str]) -> list[str]:
    """The names that show something a T4 cannot run or the T4 mode forgoes, each with what it is."""
    return [f"{what}: {name}" for name in names for what, pattern in FORBIDDEN if re.search(pattern, name, flags=re.IGNORECASE)]


def write(path: Path, kernels: Iterable[Kernel], about: Mapping[str, Any]) -> None:
    """A JSON file: what ran (`about`), and one line a kernel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(one._asdict())}" for one in kernels)
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
    path.write_text(f'{{\n{head} "kernels": [\n{lines}\n ]\n}}\n', encoding="utf-8")
