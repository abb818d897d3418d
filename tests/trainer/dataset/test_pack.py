from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from trainer.dataset import pack


def plain_first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The definition, row by row."""
    rows: list[list[int]] = []
    for number, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= max_tokens:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 64, 65, 200])
def test_it_is_first_fit(number: int) -> None:
    chance = random.Random(number)
    for most in (1, 10, 64):
        lengths = [chance.randint(1, most) for _ in range(number)]
        assert pack.pack(lengths, 64) == plain_first_fit(lengths, 64)


def test_every_record_is_in_exactly_one_row_and_no_row_is_too_long() -> None:
    chance = random.Random(1)
    lengths = [min(4096, int(chance.lognormvariate(6, 1)) + 1) for _ in range(5000)]
    rows = pack.pack(lengths, 4096)
    assert sorted(number for row in rows for number in row) == list(range(5000))
    assert all(row == sorted(row) and sum(lengths[number] for number in row) <= 4096 for row in rows)
    assert pack.fill(lengths, len(rows), 4096) > 0.97


def test_at_most_one_row_is_half_empty() -> None:
    """First-fit's own invariant: two half-empty rows would have been one."""
    chance = random.Random(2)
    lengths = [chance.randint(1, 100) for _ in range(2000)]
    half_empty = [row for row in pack.pack(lengths, 100) if sum(lengths[number] for number in row) <= 50]
    assert len(half_empty) <= 1


def test_a_hundred_thousand_records_take_seconds() -> None:
    chance = random.Random(3)
    lengths = [chance.randint(10, 2000) for _ in range(100_000)]
    began = time.process_time()
    pack.pack(lengths, 4096)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("lengths", [[0], [5, 65], [-1]])
def test_a_length_that_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"1\.\.64"):
        pack.pack(lengths, 64)


def test_nothing_fills_nothing() -> None:
    assert pack.pack([], 64) == [] and pack.fill([], 0, 64) == 0.0
