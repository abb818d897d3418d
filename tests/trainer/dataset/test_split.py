from __future__ import annotations

import hashlib

import pytest

from trainer.dataset import records, split


def ids(number: int) -> list[str]:
    return [hashlib.sha256(str(one).encode()).hexdigest() for one in range(number)]


def test_the_share_that_is_held_out_is_the_one_asked_for() -> None:
    assert len(split.held_out(ids(20_000), 0.1)) == pytest.approx(2000, rel=0.1)


def test_a_record_keeps_its_side_when_others_come() -> None:
    few, many = ids(200), ids(2000)
    assert split.held_out(many, 0.1) & set(few) == split.held_out(few, 0.1)


def test_the_same_prompt_has_the_same_side_whatever_was_answered() -> None:
    prompt = [{"role": "user", "content": "when?"}]
    one, other = ([*prompt, {"role": "assistant", "content": answer}] for answer in ("now", "later"))
    assert records.prompt_id(one) == records.prompt_id(other)
    assert records.fingerprint(one) != records.fingerprint(other)


def test_a_text_cannot_pass_for_two_turns() -> None:
    """Sentinel for the hash: turn boundaries are part of it."""
    answer = {"role": "assistant", "content": "x"}
    whole = [{"role": "user", "content": "a,b"}, answer]
    assert records.prompt_id(whole) != records.prompt_id(
        [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}, answer]
    )


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_of_two_or_more_prompts_each_side_gets_one(fraction: float, number: int) -> None:
    valid = split.held_out(ids(number), fraction)
    assert 0 < len(valid) < number


def test_of_one_prompt_none_can_be_forced() -> None:
    assert split.held_out(ids(1), 1e-9) == set()
    assert split.held_out([], 0.5) == set()
