"""Applies a manifest's `prompt` to a conversation, and renders Gemma 3's turns. Pure.

The rules are the release's data (rewrite, strip, stop, sampling), so that what is served is what was trained on. The turns
are Gemma's: the golden conversations in tests/contract/ and the probes of every release hold `render` to its template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from server.chat import ChatRequest, Message, Wishes
from server.errors import BadRequest
from server.manifest import Prompt

T = TypeVar("T")


def check_size(messages: Sequence[Message], max_messages: int, max_chars: int) -> None:
    """Raises BadRequest with both numbers: the conversation has too many messages, or one is too long."""
    if len(messages) > max_messages:
        raise BadRequest(f"messages: there are {len(messages)}, and {max_messages} are read: leave out the oldest turns")
    for number, message in enumerate(messages):
        if (length := len(message.content)) > max_chars:
            raise BadRequest(f"messages[{number}].content has {length} characters, and {max_chars} are read: shorten it")


def request(messages: Sequence[Message], wishes: Wishes, prompt: Prompt, max_tokens: int | None = None) -> ChatRequest:
    """A conversation as the engine gets it, with the release's sampling where the client wished nothing.

    `max_tokens`: longest answer that this server gives, tokens; who wishes for more gets this.

    Raises:
        BadRequest: the turns do not alternate, or there is nothing to answer.
    """
    sampling = prompt.sampling
    return ChatRequest(
        messages=clean(messages, prompt),
        max_tokens=min(_or(wishes.max_tokens, sampling.num_predict), prompt.num_ctx, _or(max_tokens, prompt.num_ctx)),
        temperature=_or(wishes.temperature, sampling.temperature),
        top_k=_or(wishes.top_k, sampling.top_k),
        top_p=_or(wishes.top_p, sampling.top_p),
        min_p=_or(wishes.min_p, sampling.min_p),
        repeat_penalty=_or(wishes.repeat_penalty, sampling.repeat_penalty),
        seed=wishes.seed,
        stop=(*prompt.stop, *(text for text in wishes.stop if text not in prompt.stop)),
        schema=wishes.schema,
    )


def _or(wish: T | None, default: T) -> T:
    return default if wish is None else wish


def clean(messages: Sequence[Message], prompt: Prompt) -> tuple[Message, ...]:
    """Rewrite what could forge a turn, trim as the template does, drop an empty system message, check the turns."""
    _check_turns(messages)
    cleaned = [Message(message.role, _clean(message, prompt)) for message in messages]
    for number, message in enumerate(cleaned):
        if message.role == "user" and not message.content:
            raise BadRequest(f"messages[{number}].content is empty: there is nothing to answer")
    return tuple(message for message in cleaned if message.role != "system" or message.content)


def _clean(message: Message, prompt: Prompt) -> str:
    text = message.content
    for rule in prompt.rewrite:
        text = text.replace(rule.old, rule.new)
    return text.strip() if message.role in prompt.strip else text


def _check_turns(messages: Sequence[Message]) -> None:
    start = 1 if messages and messages[0].role == "system" else 0
    for number, message in enumerate(messages[start:], start):
        wanted = "user" if (number - start) % 2 == 0 else "assistant"
        if message.role != wanted:
            raise BadRequest(
                f"messages[{number}].role is {message.role!r} where {wanted!r} must stand: "
                "an optional system message first, then user and assistant in turn"
            )
    if (len(messages) - start) % 2 == 0:
        raise BadRequest("messages must end with a user message, the one to answer")


def render(messages: Sequence[Message]) -> str:
    """Gemma 3's turns for cleaned messages, open for the model's answer; no <bos>.

    Gemma has no system turn: its text stands in the first user turn, followed by a blank line.
    """
    system = "".join(f"{message.content}\n\n" for message in messages if message.role == "system")
    parts: list[str] = []
    for message in messages:
        if message.role == "system":
            continue
        role = "model" if message.role == "assistant" else "user"
        parts.append(f"<start_of_turn>{role}\n{system}{message.content}<end_of_turn>\n")
        system = ""
    return "".join(parts) + "<start_of_turn>model\n"
