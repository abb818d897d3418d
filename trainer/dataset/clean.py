"""What happens to a conversation between the user's file and the split: answered turns only, no duplicates, short enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.dataset.template import Message


def answered(messages: Sequence[Message]) -> list[Message]:
    """The conversation up to its last answer: a question at the end that nobody answered teaches nothing."""
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return list(messages[: last + 1])


def shorten(messages: Sequence[Message], num_tokens: Callable[[Sequence[Message]], int], max_tokens: int) -> list[Message] | None:
    """Drop as few of the oldest whole turns (a question with its answer) as make the conversation fit; the system text stays.

    num_tokens counts the rendered conversation. Halving finds the number of turns, since every turn takes tokens.

    Returns:
        None where the last turn alone is too long.
    """
    head = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = messages[len(head) :]

    def without(dropped: int) -> list[Message]:
        return [*head, *turns[2 * dropped :]]

    low, high = 0, (len(turns) - 1) // 2
    if num_tokens(without(high)) > max_tokens:
        return None
    while low < high:
        middle = (low + high) // 2
        if num_tokens(without(middle)) > max_tokens:
            low = middle + 1
        else:
            high = middle
    return without(low)
