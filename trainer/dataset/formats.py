"""The user's file as conversations: four formats, JSON or JSON Lines, and every problem with its line, value and remedy.

    messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}
    prompt_completion  {"prompt": "...", "completion": "..."}, both text or both lists of messages

A file is in one format. Which one is told by the keys of its first record unless the config names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.dataset.template import Message
from trainer.errors import DataError

MOST_LISTED = 20
"""Problems that are shown one by one; the others are counted."""

README = "see data/README.md"
_MEND = "mend the list there; what follows was not read"

KEYS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
"""What a record of a format must have; also the order in which formats are tried."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "model": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}


class Conversation(NamedTuple):
    line: int
    """Where it begins in the file, from 1."""
    messages: list[Message]


class WrongError(ValueError):
    """One record cannot be used; the text says what was found and what to do."""


class Reader:
    """Iterates over a file's conversations, collecting problems on the way. Call check() after the iteration.

    path: JSON Lines, or one JSON list; wanted: a format's name, or "auto".
    """

    def __init__(self, path: Path, wanted: str = "auto") -> None:
        self.path = path
        self.format = "" if wanted == "auto" else wanted
        self._wanted = wanted
        self._listed: list[str] = []
        self._num_problems = 0
        self._num_records = 0

    def __iter__(self) -> Iterator[Conversation]:
        for line, tree in self._objects():
            self._num_records += 1
            try:
                yield Conversation(line, self._messages(tree))
            except WrongError as problem:
                self._report(line, str(problem))

    def check(self) -> None:
        """Say what is wrong with the file, if anything.

        Raises:
            DataError: every problem that was met, the first MOST_LISTED of them word for word.
        """
        if not self._num_records and not self._num_problems:
            self._report(1, f"the file has no records; put one JSON object on each line, {README}")
        more = self._num_problems - len(self._listed)
        if self._num_problems:
            raise DataError(*self._listed, *([f"... and {more} more problems in {self.path}"] if more else []))

    def _report(self, line: int, problem: str) -> None:
        self._num_problems += 1
        if len(self._listed) < MOST_LISTED:
            self._listed.append(f"{self.path}:{line}: {problem}")

    def _objects(self) -> Iterator[tuple[int, Any]]:
        with self.path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        yield from self._listed_objects() if head.startswith(b"[") else self._lines()

    def _lines(self) -> Iterator[tuple[int, Any]]:
        """One object a line. A broken line is reported and the reading goes on."""
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                text = self._decoded(raw, number)
                if text is None or not text.strip():
                    continue
                try:
                    yield number, json.loads(text)
                except json.JSONDecodeError as error:
                    self._report(
                        number, _broken(error.msg, text, error.pos, "each line must be one whole JSON object, or the file one list [...]")
                    )

    def _listed_objects(self) -> Iterator[tuple[int, Any]]:
        """One list of objects. After a broken one nobody knows where the next begins, so the reading ends there."""
        text = self._decoded(self.path.read_bytes(), 1)
        if text is None:
            return
        decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
        separator = ""
        while True:
            at = _skip_space(text, at)
            line, counted = line + text.count("\n", counted, at), at
            if text[at : at + 1] == "]" and _skip_space(text, at + 1) == len(text):
                return
            if separator and text[at : at + 1] == separator:
                at, separator = at + 1, ""
                continue
            if separator or at >= len(text):
                self._report(line, _broken("a ',' or the closing ']' is missing", text, at, _MEND))
                return
            try:
                tree, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                self._report(error.lineno, _broken(error.msg, text, error.pos, _MEND))
                return
            separator = ","
            yield line, tree

    def _decoded(self, raw: bytes, line: int) -> str | None:
        try:
            return raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            line += raw.count(b"\n", 0, error.start)
            self._report(line, f"byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8")
            return None

    def _messages(self, tree: Any) -> list[Message]:
        if not isinstance(tree, dict):
            raise WrongError(f"a record must be a JSON object, not {_shown(tree)}; {README}")
        if not self.format:
            self.format = _detect(tree)
        missing = [key for key in KEYS[self.format] if key not in tree]
        if missing:
            why = "which data.format asks for" if self._wanted != "auto" else "which the records before it have"
            raise WrongError(
                f"no {' and no '.join(map(repr, missing))} in it, as format {self.format} needs, {why}; "
                f"it has {_shown(list(tree))}; {README}"
            )
        messages = _PARSERS[self.format](tree)
        _check_turns(messages)
        return messages


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _broken(what: str, text: str, at: int, remedy: str) -> str:
    return f"broken JSON: {what} at {_shown(text[max(0, at - 20) : at + 20])}; {remedy}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _detect(tree: Mapping[str, Any]) -> str:
    for name, keys in KEYS.items():
        if all(key in tree for key in keys):
            return name
    known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
    raise WrongError(f"none of the known formats; it has the keys {_shown(list(tree))}, wanted are {known}; {README}")


def _of_messages(tree: Mapping[str, Any]) -> list[Message]:
    return _turns(tree["messages"], "messages", "role", "content", ROLES)


def _of_sharegpt(tree: Mapping[str, Any]) -> list[Message]:
    turns = _turns(tree["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    return turns if turns and turns[0]["role"] == "system" else [*_system(tree), *turns]


def _of_alpaca(tree: Mapping[str, Any]) -> list[Message]:
    task, context = _text(tree["instruction"], "instruction"), tree.get("input")
    question = f"{task}\n\n{_text(context, 'input')}" if context else task
    return [*_system(tree), {"role": "user", "content": question}, {"role": "assistant", "content": _text(tree["output"], "output")}]


def _of_prompt_completion(tree: Mapping[str, Any]) -> list[Message]:
    prompt, completion = tree["prompt"], tree["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*_turns(prompt, "prompt", "role", "content", ROLES), *_turns(completion, "completion", "role", "content", ROLES)]
    return [
        *_system(tree),
        {"role": "user", "content": _text(prompt, "prompt")},
        {"role": "assistant", "content": _text(completion, "completion")},
    ]


_PARSERS: Mapping[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _of_messages,
    "sharegpt": _of_sharegpt,
    "alpaca": _of_alpaca,
    "prompt_completion": _of_prompt_completion,
}


def _system(tree: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": _text(tree["system"], "system")}] if tree.get("system") else []


def _turns(turns: Any, where: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Message]:
    if not isinstance(turns, list):
        raise WrongError(f"{where!r} must be a list of turns, not {_shown(turns)}; {README}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise WrongError(f"turn {number} of {where!r} must be an object with {role_key!r} and {text_key!r}, not {_shown(turn)}")
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise WrongError(
                f"unknown role {_shown(role)} in turn {number}; Gemma knows {', '.join(roles)}: rename it, or take the record out"
            )
        messages.append({"role": roles[role], "content": _text(turn[text_key], f"{text_key} of turn {number}")})
    return messages


def _text(value: Any, where: str) -> str:
    """A text, or the texts of a list of {"type": "text"} parts put together."""
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in value
    ):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise WrongError(f"{where} must be text, not {_shown(value)}; images and tool calls cannot be trained here")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise WrongError(f"{where} holds half a character ({value[error.start]!r}); write it as one, or take it out") from error
    return value


def _check_turns(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise WrongError(f"no assistant turn, only {_shown(roles)}; there is nothing to learn: add an answer, or take the record out")
    turns = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            place = number + 1 + len(roles) - len(turns)
            raise WrongError(
                f"turn {place} is of {role} where {wanted} must speak: after an optional system text, "
                "user and assistant take turns, user first"
            )
    for number, message in enumerate(messages, 1):
        if message["role"] != "system" and not message["content"].strip():
            raise WrongError(f"turn {number} ({message['role']}) is empty; write it, or take the record out")
