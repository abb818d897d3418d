"""How much memory this process took at most."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_bytes(device: str) -> int:
    """torch's max_memory_allocated on CUDA, the process's largest resident set (VmHWM) on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
