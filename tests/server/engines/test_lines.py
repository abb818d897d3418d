from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from server.engines.lines import lines

pytestmark = pytest.mark.anyio
TEXT = '{"a": "x\u2028y\u2029z\x85\x0b\x0c\x1c\x1d\x1e ü👩‍🚀\r"}\n\n{"b": 1}\nlast'


async def pieces(size: int) -> AsyncIterator[bytes]:
    content = TEXT.encode()
    for start in range(0, len(content), size):
        yield content[start : start + size]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_only_a_line_feed_ends_a_line_however_the_bytes_come(size: int) -> None:
    assert [line async for line in lines(pieces(size))] == TEXT.split("\n")
