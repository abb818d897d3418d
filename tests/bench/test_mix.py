from __future__ import annotations

from bench import mix
from trainer.dataset.pack import pack


def test_lengths_stay_within_their_bounds_and_are_mixed() -> None:
    found = mix.lengths(200, 1024, packed=False)
    assert len(found) == 200
    assert min(found) >= mix.SHORTEST
    assert max(found) == 1024
    assert len(set(found)) > 100


def test_the_same_lengths_come_every_time() -> None:
    assert mix.lengths(20, 512, packed=False) == mix.lengths(20, 512, packed=False)


def test_packed_records_fill_at_least_the_rows_asked_for() -> None:
    found = mix.lengths(12, 2048, packed=True)
    rows = pack(found, 2048)
    assert len(rows) >= 12
    assert len(found) > 2 * len(rows)
