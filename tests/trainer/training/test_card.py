"""card: one process uses one card, the one with room."""

from __future__ import annotations

import pytest

from trainer.training.card import choose_card


def test_the_card_with_the_most_free_memory_is_taken() -> None:
    assert choose_card("0, 300, Tesla T4\n1, 15000, Tesla T4\n2, 14000, Tesla T4\n") == 1


def test_of_equal_cards_the_first_is_taken() -> None:
    assert choose_card("0, 15095, Tesla T4\n1, 15095, Tesla T4\n") == 0


def test_a_card_that_does_not_say_how_much_is_free_comes_last() -> None:
    assert choose_card("0, [N/A], GB10\n1, 5, Tesla T4\n") == 1


def test_no_card_is_an_error_that_shows_what_was_said() -> None:
    with pytest.raises(ValueError, match="couldn't communicate"):
        choose_card("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
