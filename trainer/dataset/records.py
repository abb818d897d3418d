"""One prepared record: a cleaned conversation, its token ids and its supervised spans; a line of train.jsonl or valid.jsonl."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.dataset.template import Message, Span


@dataclass(frozen=True, slots=True)
class Record:
    id: str
    """sha256 of the prompt turns: everything before the last answer."""
    line: int
    """Where the conversation begins in the user's file, from 1."""
    messages: Sequence[Message]
    ids: Sequence[int]
    """The whole rendered conversation, <bos> first."""
    spans: Sequence[Span]
    """Token ranges [start, end) that carry loss."""

    @property
    def prompt(self) -> Sequence[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def to_json(self) -> str:
        """The record as one line, without its newline."""
        tree = {"id": self.id, "line": self.line, "messages": list(self.messages), "ids": list(self.ids), "spans": list(self.spans)}
        return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Record:
    tree = json.loads(text)
    return Record(tree["id"], tree["line"], tree["messages"], tree["ids"], [(start, end) for start, end in tree["spans"]])


def read(path: Path) -> Iterator[Record]:
    """The records of a prepared file, in its order."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield from_json(line)


def prompt_id(messages: Sequence[Message]) -> str:
    """sha256, in hex, of all turns before the last answer. Equal prompts have equal ids, whatever was answered."""
    return _digest(messages[:-1]).hexdigest()


def fingerprint(messages: Sequence[Message]) -> bytes:
    """16 bytes that stand for the whole conversation, to find duplicates."""
    return _digest(messages).digest()[:16]


def _digest(messages: Sequence[Message]) -> hashlib._Hash:
    turns = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode())
