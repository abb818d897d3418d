"""Who else holds memory of the card, as nvidia-smi tells it: a wall around one command."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

QUERY = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
MUCH_BYTES = 256 * 2**20
"""More than a desktop takes."""


class Holder(NamedTuple):
    """num_bytes: 0 where the driver does not tell."""

    pid: int
    name: str
    num_bytes: int

    def __str__(self) -> str:
        size = f"{self.num_bytes / 1e9:.2f} GB" if self.num_bytes else "memory of unknown size"
        return f"{self.name} (pid {self.pid}) holds {size}; free it with: {self.freed_by}"

    @property
    def freed_by(self) -> str:
        """An Ollama that keeps a model alive gives it back when asked; nothing needs to be killed."""
        return "ollama stop MODEL (ollama ps names it)" if "ollama" in self.name.lower() else f"kill {self.pid}"


def on_card(card: str) -> list[Holder]:
    """Processes with memory on the card, which is named as in CUDA_VISIBLE_DEVICES; none where nvidia-smi cannot tell."""
    command = shutil.which(QUERY[0])
    if command is None:
        return []
    which = ("--id", card) if card else ()
    asked = subprocess.run([command, *QUERY[1:], *which], capture_output=True, text=True, check=False, timeout=60)
    return parse(asked.stdout) if asked.returncode == 0 else []


def parse(listed: str) -> list[Holder]:
    """Lines of `pid, name, MiB`; a name may hold commas, and MiB be "[N/A]"."""
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines()]
    return [_holder(row) for row in rows if len(row) >= 3 and row[0].isdigit()]


def _holder(row: Sequence[str]) -> Holder:
    pid, *name, mib = row
    whole = ", ".join(name)
    shown = PurePath(whole).name if whole.startswith("/") and "ollama" not in whole.lower() else whole
    return Holder(int(pid), shown, int(mib) * 2**20 if mib.isdigit() else 0)
