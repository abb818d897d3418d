from __future__ import annotations

import pytest

from trainer import cards


@pytest.mark.parametrize(
    ("listed", "free"), [("15101\n", 15_101 * 2**20), ("[N/A]\n", None), ("", None), ("No devices were found\n", None)]
)
def test_free_memory_is_read_in_mib_and_unknown_where_it_is_not_told(listed: str, free: int | None) -> None:
    assert cards.parse_free(listed) == free


def test_the_first_card_is_there_exactly_where_one_is_counted() -> None:
    found = cards.first()
    assert (found is not None) == (cards.count() > 0)
    if found:
        assert found.uuid.startswith("GPU-")
        assert cards.free_bytes(found) is None or cards.free_bytes(found) <= 1.05 * found.total_bytes  # type: ignore[operator]
