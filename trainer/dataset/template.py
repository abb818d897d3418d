"""Gemma's turn template, its inverse in tokens, and the cleaning that training and serving share.

    <bos><start_of_turn>user
    system text, blank line, user text<end_of_turn>
    <start_of_turn>model
    assistant text<end_of_turn>

Identical to Hugging Face's template for cleaned conversations (tested against it). What is cleaned: markers inside a text are
broken up, so that a text can never open or close a turn; user and assistant texts are stripped, as the template itself does;
an empty system text is dropped, which the template would render as two newlines. The gateway applies the same three
rules, which it finds as data in the release's manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from tokenizers import Tokenizer

from trainer.tokenizer import BOS, BOS_ID, END_OF_TURN, END_OF_TURN_ID, EOS, PAD, START_OF_TURN, START_OF_TURN_ID

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

Span = tuple[int, int]
"""Supervised tokens: first, and one after the last."""

REWRITE: tuple[tuple[str, str], ...] = tuple((marker, f"{marker[:-1]} >") for marker in (START_OF_TURN, END_OF_TURN, BOS, EOS, PAD))
"""Literal replacements in every text, in this order."""

STRIP: tuple[str, ...] = ("user", "assistant")
"""Roles whose texts lose leading and trailing whitespace (str.strip)."""

_ROLES = {"user": "user", "assistant": "model"}
_OPENING = f"{START_OF_TURN}model\n"


def clean(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Rewrite markers, strip, drop an empty system text."""
    cleaned = []
    for message in messages:
        role, text = message["role"], message["content"]
        for old, new in REWRITE:
            text = text.replace(old, new)
        if role in STRIP:
            text = text.strip()
        if role != "system" or text:
            cleaned.append({"role": role, "content": text})
    return cleaned


def render(messages: Sequence[Message], *, generation: bool) -> str:
    """The text of a cleaned conversation, without <bos>; generation opens the model's next turn."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = messages if system is None else messages[1:]
    prefix = "" if system is None else f"{system}\n\n"
    parts = []
    for message in turns:
        parts.append(f"{START_OF_TURN}{_ROLES[message['role']]}\n{prefix}{message['content'].strip()}{END_OF_TURN}\n")
        prefix = ""
    if generation:
        parts.append(_OPENING)
    return "".join(parts)


def encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
    """Token ids of a cleaned conversation, <bos> first, and the spans that carry loss.

    A span is an assistant's text and its <end_of_turn>; the newline after it is not supervised.
    """
    return encode_batch(tokenizer, [messages])[0]


def encode_batch(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[Span]]]:
    """encode() of many conversations at once, in parallel threads."""
    opening = tokenizer.encode(_OPENING, add_special_tokens=False).ids
    texts = [render(messages, generation=False) for messages in conversations]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [_with_spans([BOS_ID, *encoding.ids], opening) for encoding in encodings]


def _with_spans(ids: list[int], opening: Sequence[int]) -> tuple[list[int], list[Span]]:
    """Find the model's turns by their markers, which a cleaned text cannot contain; user and model alternate, user first."""
    starts = [at for at, token in enumerate(ids) if token == START_OF_TURN_ID]
    ends = [at for at, token in enumerate(ids) if token == END_OF_TURN_ID]
    assert len(starts) == len(ends) and all(end < start for end, (_, start) in zip(ends, pairwise(starts), strict=False)), (
        "turns are not closed one by one"
    )
    spans = []
    for start, end in zip(starts[1::2], ends[1::2], strict=True):
        first = start + len(opening)
        # A tokenizer that merged the header with the text would make a prompt at serving time end otherwise than here.
        assert ids[start:first] == list(opening), "the tokenizer merges a turn's header with its text"
        spans.append((first, end + 1))
    return ids, spans
