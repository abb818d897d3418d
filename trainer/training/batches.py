"""From prepared records to the lists that a forward pass reads. Pure: no torch.

A row is what one line of a batch holds: a record, or with packing several whole ones behind each other, each with its own
positions from 0. Labels equal the ids on supervised spans and IGNORE elsewhere; the model shifts them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

IGNORE = -100
"""Label of a position that bears no loss (torch's cross_entropy default)."""
PAD = 0


class Encoded(Protocol):
    """What training needs of a prepared record."""

    @property
    def id(self) -> str: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def spans(self) -> Sequence[Sequence[int]]: ...


class Example(NamedTuple):
    """A record without its text, in 4 bytes a token."""

    id: str
    ids: array[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def labels(self) -> list[int]:
        labels = [IGNORE] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


class Row(NamedTuple):
    ids: Sequence[int]
    labels: Sequence[int]
    lengths: tuple[int, ...]
    """Tokens of each record in the row."""


def examples(records: Iterable[Encoded]) -> list[Example]:
    return [Example(record.id, array("i", record.ids), tuple((span[0], span[1]) for span in record.spans)) for record in records]


def sample(found: Sequence[Example], most: int) -> list[Example]:
    """The `most` examples with the smallest ids: ids are hashes of content, so the same ones on every machine and in any order."""
    return sorted(found, key=lambda example: example.id)[:most]


def row(*members: Example) -> Row:
    ids = [token for example in members for token in example.ids]
    labels = [label for example in members for label in example.labels]
    return Row(ids, labels, tuple(len(example.ids) for example in members))


def accumulation(tokens_per_step: int, batch_rows: int, mean_row_tokens: float) -> int:
    """Forward passes of one optimizer step, so that a step sees about tokens_per_step tokens."""
    return max(1, round(tokens_per_step / (batch_rows * mean_row_tokens)))


def padded(rows: Sequence[Row]) -> dict[str, list[list[int]]]:
    """Rows of one record each, filled up at the right. Padding is masked, bears no loss and has position 0."""
    width = max(len(row.ids) for row in rows)

    def fill(values: Sequence[int], with_: int) -> list[int]:
        return [*values, *[with_] * (width - len(values))]

    return {
        "input_ids": [fill(row.ids, PAD) for row in rows],
        "labels": [fill(row.labels, IGNORE) for row in rows],
        "attention_mask": [fill([1] * len(row.ids), 0) for row in rows],
        "position_ids": [fill(range(len(row.ids)), 0) for row in rows],
    }


class Packed(NamedTuple):
    """One line [1, tokens] with the boundaries of its records: positions start anew and cu_seqlens = 0, n1, n1 + n2, ..."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    cu_seqlens: list[int]
    longest: int


def packed(rows: Sequence[Row]) -> Packed:
    """All rows of a batch behind each other, without padding."""
    lengths = [length for row in rows for length in row.lengths]
    return Packed(
        [token for row in rows for token in row.ids],
        [label for row in rows for label in row.labels],
        [position for length in lengths for position in range(length)],
        [0, *accumulate(lengths)],
        max(lengths),
    )
