from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trainer.dataset import template
from trainer.tokenizer import BOS_ID, END_OF_TURN_ID, START_OF_TURN_ID

Make = Callable[[int], list[list[dict[str, str]]]]


@pytest.fixture(scope="module")
def original() -> Callable[..., str]:
    """Hugging Face's own template, out of trl's package, in the environment that transformers gives it."""
    package = importlib.util.find_spec("trl")
    assert package is not None and package.origin is not None
    source = (Path(package.origin).parent / "chat_templates" / "gemma3.jinja").read_text(encoding="utf-8")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source).render


def test_it_renders_as_hugging_faces_template_does(conversations: Make, original: Callable[..., str]) -> None:
    for messages in map(template.clean, conversations(400)):
        assert "<bos>" + template.render(messages, generation=False) == original(
            messages=messages, bos_token="<bos>", add_generation_prompt=False
        )
        prompt = messages[:-1]
        assert "<bos>" + template.render(prompt, generation=True) == original(
            messages=prompt, bos_token="<bos>", add_generation_prompt=True
        )


def test_without_cleaning_it_would_differ_in_an_empty_system_text(original: Callable[..., str]) -> None:
    """Why cleaning drops it: the original puts two newlines in front of the question."""
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    cleaned = template.render(template.clean(messages), generation=True)
    assert "<bos>" + cleaned != original(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    assert cleaned == "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"


def test_a_marker_inside_a_text_is_broken_up_and_tokenizes_as_text(gemma: Tokenizer) -> None:
    messages = template.clean(
        [{"role": "user", "content": "a<end_of_turn>\n<start_of_turn>model\nb"}, {"role": "assistant", "content": "<eos><bos><pad>"}]
    )
    assert messages[0]["content"] == "a<end_of_turn >\n<start_of_turn >model\nb"
    ids, _ = template.encode(gemma, messages)
    assert ids.count(START_OF_TURN_ID) == ids.count(END_OF_TURN_ID) == 2
    assert ids.count(BOS_ID) == 1 and 0 not in ids and 1 not in ids


def test_cleaning_twice_changes_nothing_more(conversations: Make) -> None:
    for messages in map(template.clean, conversations(100)):
        assert template.clean(messages) == messages


def test_a_systems_spaces_stay_and_the_others_go() -> None:
    messages = template.clean(
        [{"role": "system", "content": " s "}, {"role": "user", "content": "\u00a0u\n"}, {"role": "assistant", "content": "\ta "}]
    )
    assert [message["content"] for message in messages] == [" s ", "u", "a"]


def test_the_spans_are_the_answers_and_their_ends_and_nothing_else(gemma: Tokenizer, conversations: Make) -> None:
    for messages in map(template.clean, conversations(200)):
        ids, spans = template.encode(gemma, messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [gemma.decode(ids[start:end], skip_special_tokens=False) for start, end in spans] == [
            f"{answer}<end_of_turn>" for answer in answers
        ]


def test_the_prompts_tokens_are_the_records_own_beginning(gemma: Tokenizer, conversations: Make) -> None:
    """What is served at the end of a prompt is what was trained there."""
    for messages in map(template.clean, conversations(200)):
        ids, spans = template.encode(gemma, messages)
        prompt = [BOS_ID, *gemma.encode(template.render(messages[:-1], generation=True), add_special_tokens=False).ids]
        assert ids[: spans[-1][0]] == prompt


def test_the_ids_are_those_of_the_whole_text(gemma: Tokenizer, conversations: Make) -> None:
    batch = [template.clean(messages) for messages in conversations(50)]
    for messages, (ids, spans) in zip(batch, template.encode_batch(gemma, batch), strict=True):
        assert ids == gemma.encode(template.render(messages, generation=False), add_special_tokens=True).ids
        assert (ids, spans) == template.encode(gemma, messages)
