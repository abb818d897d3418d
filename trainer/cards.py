"""NVIDIA cards that this process can use, asked from the driver itself and from nvidia-smi: no torch, no CUDA context, milliseconds."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import uuid
from typing import Any, NamedTuple

QUERY = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")


class Card(NamedTuple):
    """uuid: as nvidia-smi and CUDA_VISIBLE_DEVICES name it; total_bytes: what CUDA counts, less than the sticker says."""

    uuid: str
    name: str
    total_bytes: int


def count() -> int:
    """Number of visible cards; 0 without a driver. CUDA_VISIBLE_DEVICES is honoured by the driver."""
    driver = _driver()
    number = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return 0
    return number.value


def first() -> Card | None:
    """The first visible card, which is the one that training uses."""
    driver = _driver()
    if driver is None or count() == 0:
        return None
    device, raw, name, total = ctypes.c_int(0), (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(100), ctypes.c_size_t(0)
    asked = (
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetUuid(raw, device),
        driver.cuDeviceGetName(name, 100, device),
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device),
    )
    return None if any(asked) else Card(f"GPU-{uuid.UUID(bytes=bytes(raw))}", name.value.decode(), total.value)


def free_bytes(card: Card) -> int | None:
    """What nobody has taken of the card's memory; None where nvidia-smi cannot tell."""
    command = shutil.which(QUERY[0])
    if command is None:
        return None
    asked = subprocess.run([command, *QUERY[1:], "--id", card.uuid], capture_output=True, text=True, check=False, timeout=60)
    return parse_free(asked.stdout) if asked.returncode == 0 else None


def parse_free(listed: str) -> int | None:
    """One line with MiB; "[N/A]" where a card has no memory of its own."""
    mib = listed.strip()
    return int(mib) * 2**20 if mib.isdigit() else None


def _driver() -> Any:
    """libcuda after cuInit, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None
