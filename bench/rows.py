"""One JSON object a line for every measurement, in the shape that rows keep for years: bench, who, work, metrics, hardware, versions, commit, run."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NAMED = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "unsloth",
    "datasets",
    "accelerate",
    "gguf",
    "xllamacpp",
    "fastapi",
    "ollama",
)
"""Packages whose versions a figure depends on."""


def append(
    bench: str, who: str, work: Mapping[str, Any], metrics: Mapping[str, Any], path: Path | None = None, run: str | None = None
) -> dict[str, Any]:
    """Append one row to bench/results/<bench>.jsonl, or to `path`, and return it.

    who: "ours", or the peer with its version. work: the settings. metrics: numbers, units in the names.
    The commit comes from TRINITY_COMMIT where .git did not travel; a tree with changes is marked `-dirty`. run: what several
    commands on one machine share, from here or from TRINITY_RUN; else each process has its own.
    """
    row = {
        "bench": bench,
        "who": who,
        "work": dict(work),
        "metrics": dict(metrics),
        "hardware": hardware(),
        "versions": versions(),
        "commit": os.environ.get("TRINITY_COMMIT") or commit(),
        "run": run or os.environ.get("TRINITY_RUN") or run_id(),
    }
    target = path or RESULTS / f"{bench}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


@functools.cache
def run_id() -> str:
    """One id for all rows of this process."""
    return uuid.uuid4().hex[:12]


def hardware() -> dict[str, Any]:
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _said(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines(),
        "driver": next(iter(_said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()), ""),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in NAMED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """HEAD, with `-dirty` where tracked files other than results differ from it; "unknown" outside a repository."""
    head = _said(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _said(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"])
    return f"{head}-dirty" if head and changed else head or "unknown"


def _said(command: Sequence[str]) -> str:
    """Standard output of a command, or nothing where it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
