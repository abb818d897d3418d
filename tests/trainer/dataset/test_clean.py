from __future__ import annotations

from collections.abc import Sequence

import pytest

from trainer.dataset import clean
from trainer.dataset.template import Message


def conversation(num_turns: int, *, system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    turns = [
        ({"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}" + "x" * number})
        for number in range(num_turns)
    ]
    return [*head, *(message for turn in turns for message in turn)]


def num_characters(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


@pytest.mark.parametrize("system", ["", "be brief"])
@pytest.mark.parametrize("num_turns", [1, 2, 3, 8, 9])
def test_as_few_of_the_oldest_turns_go_as_make_it_fit(num_turns: int, system: str) -> None:
    messages = conversation(num_turns, system=system)
    for limit in range(num_characters(messages) + 2):
        shorter = clean.shorten(messages, num_characters, limit)
        head = messages[:1] if system else []
        turns = messages[len(head) :]
        fitting = [kept for dropped in range(num_turns) if num_characters(kept := [*head, *turns[2 * dropped :]]) <= limit]
        assert shorter == (fitting[0] if fitting else None)


def test_the_system_text_and_the_last_answer_stay() -> None:
    shorter = clean.shorten(conversation(9, system="be brief"), num_characters, 30)
    assert shorter is not None
    assert shorter[0]["content"] == "be brief" and shorter[1]["role"] == "user" and shorter[-1]["content"].startswith("a8")


def test_a_question_that_nobody_answered_is_cut_off() -> None:
    messages = conversation(2)
    assert clean.answered([*messages, {"role": "user", "content": "and?"}]) == messages
    assert clean.answered(messages) == messages
