"""What an engine says, taken apart with care: a proxy before it, or another version of it, may say anything with HTTP 200."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from server.chat import Usage
from server.errors import EngineError

MISSHAPEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading no JSON, or JSON of another shape, raises."""


class understood:  # noqa: N801  # called as a function is
    """Around reading `said` alone. Raises EngineError when it is not what `who` should say. No @contextmanager: every token passes here."""

    def __init__(self, who: str, said: str) -> None:
        self._who = who
        self._said = said

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, MISSHAPEN):
            raise EngineError(f"{self._who} says something else than it should: {self._said[:300]}") from error


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
