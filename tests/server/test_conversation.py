from __future__ import annotations

import json
from typing import Any

import pytest

from server import conversation
from server.chat import Message, Wishes
from server.errors import BadRequest
from server.manifest import Manifest, Prompt
from tests.server.real import CONTRACT

PROMPT: Prompt = Manifest.model_validate_json((CONTRACT / "manifest.json").read_text(encoding="utf-8")).prompt
GOLDEN = [json.loads(line) for line in (CONTRACT / "conversations.jsonl").read_text(encoding="utf-8").split("\n") if line]


def messages(turns: list[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["name"]))
def test_golden_conversations_are_cleaned_and_rendered_letter_by_letter(golden: dict[str, Any]) -> None:
    cleaned = conversation.clean(messages(golden["messages"]), PROMPT)
    assert cleaned == messages(golden["rewritten"])
    assert conversation.render(cleaned) == golden["rendered"]
    assert conversation.clean(cleaned, PROMPT) == cleaned, "cleaning twice must change nothing"


def test_without_the_release_s_rules_the_forged_turns_get_through() -> None:
    """The sentinel of the golden test: it is the manifest's data that cleans."""
    lax = PROMPT.model_copy(update={"rewrite": (), "strip": ()})
    dirty = [golden for golden in GOLDEN if conversation.clean(messages(golden["messages"]), lax) != messages(golden["rewritten"])]
    assert len(dirty) >= 3


def test_an_empty_answer_in_the_history_is_fine_and_an_empty_question_is_not() -> None:
    history = [Message("user", "a"), Message("assistant", ""), Message("user", "b")]
    assert conversation.clean(history, PROMPT) == tuple(history)
    with pytest.raises(BadRequest, match=r"messages\[2\]\.content is empty"):
        conversation.clean([*history[:2], Message("user", " ")], PROMPT)


def test_no_setting_is_left_to_an_engine_and_no_answer_may_be_longer_than_the_context() -> None:
    request = conversation.request([Message("user", "a")], Wishes(max_tokens=10**9, top_k=0, temperature=0.0), PROMPT)
    assert (request.max_tokens, request.top_k, request.temperature, request.min_p) == (4096, 0, 0.0, 0.0)
