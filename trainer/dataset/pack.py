"""First-fit packing of whole records into rows of at most max_tokens tokens (Johnson 1973: at most 1.7 times the fewest rows)."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of record numbers: each record goes into the first row that still has room for it, in the order given.

    A tree over the rows' free tokens finds that row in log2(rows) steps, so a million records take seconds.

    Raises:
        ValueError: a record is empty or longer than a row.
    """
    if any(not 0 < length <= max_tokens for length in lengths):
        raise ValueError(f"every length must lie in 1..{max_tokens}")
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    # free[1] is the root, free[leaves + row] the room of a row; a parent holds the larger of its children.
    free = [max_tokens] * (2 * leaves)
    rows: list[list[int]] = []
    for number, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(number)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return rows


def fill(lengths: Sequence[int], num_rows: int, max_tokens: int) -> float:
    """Share of the rows that is tokens, 0..1."""
    return sum(lengths) / (num_rows * max_tokens) if num_rows else 0.0
