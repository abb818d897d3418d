"""What an engine says, taken apart with care: a proxy before it, or another version of it, may say anything with HTTP 200."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.chat import Usage
from server.errors import EngineError

MISSHAPEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading no JSON, or JSON of another shape, raises."""


@contextmanager
def understood(who: str, said: str) -> Iterator[None]:
    """Around reading `said` alone. Raises EngineError when it is not what `who` should say."""
    try:
        yield
    except MISSHAPEN as error:
        raise EngineError(f"{who} says something else than it should: {said[:300]}") from error


def text(value: Any) -> str:
    """A text, or none. Raises TypeError."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"no text: {value!r}")
    return value or ""


def usage(prompt_tokens: Any, completion_tokens: Any) -> Usage:
    """Raises TypeError or ValueError: a count that is none."""
    counts = Usage(prompt_tokens, completion_tokens)
    for count in (counts.prompt_tokens, counts.completion_tokens):
        if not isinstance(count, int):
            raise TypeError(f"no count: {count!r}")
        if count < 0:
            raise ValueError(f"no count: {count}")
    return counts
