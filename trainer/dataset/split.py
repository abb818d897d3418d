"""Which side a record belongs to, decided by the hash of its prompt alone.

A prompt never lands on both sides, a record keeps its side when others come or go, and no seed is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

_SPACE = 1 << 256


def is_valid(record_id: str, fraction: float) -> bool:
    """True where a record is held out: its hash, read as a number in 0..1, lies below the fraction."""
    return int(record_id, 16) < fraction * _SPACE


def held_out(ids: Iterable[str], fraction: float) -> set[str]:
    """The ids that are held out. Of two or more different ids at least one is, and at least one is not.

    Where chance leaves a side empty, it gets the id that was nearest to it.
    """
    different = set(ids)
    valid = {record_id for record_id in different if is_valid(record_id, fraction)}
    if len(different) < 2:
        return valid
    return (valid or {min(different)}) - ({max(different)} if len(valid) == len(different) else set())
