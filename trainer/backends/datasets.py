"""Wall around `datasets`: validated conversations in an Arrow file on disk, so that a million of them do not live in memory.

Why not load_dataset("json"): it guesses types from the data (an answer column of dates comes back as timestamps, spelled
otherwise), knows no line numbers, and caches by path. So lines are validated before, and Arrow is told the types.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = tuple[int, list[dict[str, str]]]
"""Line number and messages of a conversation."""


class Spool:
    """Conversations on disk, in order, as often as wanted."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def batches(self, size: int) -> Iterator[list[Row]]:
        for batch in self._table.iter(size):
            yield list(zip(batch["line"], batch["messages"], strict=True))


@contextmanager
def spooled(conversations: Iterable[tuple[int, Sequence[Mapping[str, str]]]], cache: Path) -> Iterator[Spool]:
    """Write conversations once; read them inside the block. The scratch directory under `cache` goes with it."""
    import datasets

    cache.mkdir(parents=True, exist_ok=True)
    text = datasets.Value("string")
    features = datasets.Features({"line": datasets.Value("int64"), "messages": datasets.List({"role": text, "content": text})})

    remaining = iter(conversations)
    first = next(remaining, None)
    if first is None:  # from_generator fails on nothing
        yield Spool(datasets.Dataset.from_dict({"line": [], "messages": []}, features=features))
        return

    def rows() -> Iterator[dict[str, Any]]:
        for line, messages in itertools.chain([first], remaining):
            yield {"line": line, "messages": messages}

    bars_were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="prepare-", dir=cache) as scratch:
            # The fingerprint is named because datasets would otherwise pickle the generator to hash it. Nothing is ever found
            # again by it: the scratch directory is new.
            yield Spool(datasets.Dataset.from_generator(rows, features=features, cache_dir=scratch, fingerprint=Path(scratch).name))
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()
