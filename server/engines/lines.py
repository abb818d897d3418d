"""Lines of a stream as its sender means them: ended by a line feed and by nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable


async def lines(chunks: AsyncIterable[bytes]) -> AsyncGenerator[str]:
    """The lines of UTF-8 bytes that come in any pieces, without their line feed; what is left at the end is a line too.

    str.splitlines() also splits at U+0085, U+2028 and their like. JSON holds those raw inside of strings (llama.cpp
    writes all of them so, Go the first), and an answer with one of them would be torn.
    """
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")
