"""How many NVIDIA cards this process can use, asked from the driver itself: no torch, no CUDA context, milliseconds."""

from __future__ import annotations

import ctypes


def count() -> int:
    """Number of visible cards; 0 without a driver. CUDA_VISIBLE_DEVICES is honoured by the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    number = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return 0
    return number.value
