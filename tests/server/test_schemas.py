from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from server import translate
from server.schemas import ChatBody, CompletionBody

HI = [{"role": "user", "content": "Hi"}]


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate_json(json.dumps({"messages": HI, **fields}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", "5"), ("max_tokens", 1.5), ("seed", True), ("stream", 1), ("temperature", "1"), ("model", 3), ("messages", {})],
)
def test_types_are_taken_at_their_word(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        completion(**{field: value})


def test_a_whole_number_is_a_fine_temperature() -> None:
    assert completion(temperature=0).temperature == 0.0


@pytest.mark.parametrize("stop", ["END", ["END"]])
def test_one_stop_text_may_come_without_a_list(stop: Any) -> None:
    assert completion(stop=stop).stop == ("END",)


def test_the_newer_name_of_max_tokens_goes_before_the_older() -> None:
    assert translate.completion(completion(max_tokens=5, max_completion_tokens=7)).wishes.max_tokens == 7
    assert translate.completion(completion(max_tokens=5)).wishes.max_tokens == 5


def test_only_a_json_schema_is_a_wish_for_json() -> None:
    schema = {"type": "integer"}
    wished = completion(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert translate.completion(wished).wishes.schema == schema
    assert translate.completion(completion(response_format={"type": "text"})).wishes.schema is None
    assert translate.completion(completion(response_format=None)).wishes.schema is None


@pytest.mark.parametrize("harmless", [{"n": 1}, {"tools": []}, {"tool_choice": "auto"}, {"frequency_penalty": 0.0}, {"logit_bias": {}}])
def test_what_asks_for_nothing_is_ignored(harmless: dict[str, Any]) -> None:
    completion(**harmless)


@pytest.mark.parametrize("wish", [{"n": True}, {"logprobs": 0}, {"tools": {}}, {"frequency_penalty": 0.1}, {"audio": []}])
def test_what_asks_for_something_is_refused_by_name(wish: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(wish))}: not offered"):
        completion(**wish)


def test_the_published_schema_says_either_message_or_messages() -> None:
    one, other = ChatBody.model_json_schema()["oneOf"]
    assert (one["required"], other["required"]) == (["message"], ["messages"])
    assert one["properties"]["messages"] == other["properties"]["message"] == {"type": "null"}
