"""What a client of the gateway saw, as exactly one of five things. Pure: bytes and lines in, an outcome out.

answered: whole, with its reason, its count, and a text that the model may say. refused: 429 or 503 with Retry-After. typed_error:
an error in its one shape, as a reply or at the end of a stream. left: the client hung up by itself. Whatever is none of these
(a stream that just ends, a reset, an untyped 500, the gateway's own bug, a right request called wrong, the wrong words) is unaccounted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["answered", "refused", "typed_error", "left", "unaccounted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIELDS = ("message", "type", "code", "request_id")


class Outcome(NamedTuple):
    kind: Kind
    why: str


class Question(NamedTuple):
    """What is asked, and what a greedy model says to it: the beginning of `says`, or all of it where it ends by itself."""

    path: str
    body: Mapping[str, Any]
    says: str
    stops: bool = False


def broke(error: Exception, where: str) -> Outcome:
    """The connection was reset, refused or silent."""
    return Outcome("unaccounted", f"{type(error).__name__} {where}")


def of_reply(status: int, headers: Mapping[str, str], content: bytes, question: Question | None) -> Outcome:
    """A reply that is no stream. question: None where it can only be an error."""
    try:
        tree = json.loads(content)
    except ValueError:
        return Outcome("unaccounted", f"a {status} without JSON")
    if not isinstance(tree, dict):
        return Outcome("unaccounted", f"a {status} that is no object")
    if status != 200:
        return _of_error(status, headers, tree, right=question is not None)
    choice = tree.get("choices", [tree])[0] if tree.get("choices", [tree]) else {}
    return _of_answer(choice.get("message", {}).get("content"), choice.get("finish_reason"), tree.get("usage"), question)


class Stream:
    """Reads a stream of server-sent events line by line."""

    def __init__(self, question: Question | None) -> None:
        """question: None where it can only end in an error."""
        self._question = question
        self._text = ""
        self._reason: Any = None
        self._usage: Any = None
        self._error: Any = None
        self._done = False
        self._wrong = ""

    def read(self, line: str) -> None:
        if not line or line.startswith(":"):
            return
        name, _, data = line.partition(": ")
        if self._done or self._error:
            self._wrong = self._wrong or "something after the end of a stream"
        elif name != "data":
            self._wrong = self._wrong or "a line that is no event"
        elif data == "[DONE]":
            self._done = True
        else:
            self._event(data)

    def _event(self, data: str) -> None:
        try:
            tree = json.loads(data)
            self._error = tree.get("error")
            self._usage = tree.get("usage") or self._usage
            for part in tree.get("choices", [tree]):
                self._text += part.get("delta", {}).get("content") or ""
                self._reason = part.get("finish_reason") or self._reason
        except (ValueError, AttributeError, TypeError):
            self._wrong = self._wrong or "an event of another shape"

    def so_far(self) -> Outcome:
        """The client hangs up here."""
        if self._error is not None:
            return self.end()
        if self._wrong or not (self._question and self._question.says.startswith(self._text)):
            return Outcome("unaccounted", self._wrong or f"the wrong words: {self._text[-60:]!r}")
        return Outcome("left", "in a stream")

    def end(self) -> Outcome:
        """The body came to the end that HTTP gives it."""
        if self._wrong:
            return Outcome("unaccounted", self._wrong)
        if self._error is not None:
            found = _of_error(0, {}, {"error": self._error}, right=self._question is not None)
            return Outcome(found.kind, f"{found.why} in a stream")
        if not self._done:
            return Outcome("unaccounted", "a stream that just ends")
        return _of_answer(self._text, self._reason, self._usage, self._question)


def _of_error(status: int, headers: Mapping[str, str], tree: Mapping[str, Any], *, right: bool) -> Outcome:
    """status: 0 within a stream, where it is too late for one. right: the request was as it should be, so that no 4xx but a 429 fits."""
    error = tree.get("error")
    if not isinstance(error, dict) or not all(isinstance(error.get(name), str) and error[name] for name in FIELDS):
        return Outcome("unaccounted", f"an untyped {status or 'error'}")
    code = error["code"]
    if error["type"] == "internal_error":
        return Outcome("unaccounted", "a bug of the gateway's")
    if status in (429, 503):
        if not headers.get("retry-after", "").isdigit():
            return Outcome("unaccounted", f"a {status} {code} without Retry-After")
        return Outcome("refused", code)
    if right and (error["type"] in ("invalid_request_error", "client_error") or 0 < status < 500):
        return Outcome("unaccounted", f"{code} for a request that is right")
    return Outcome("typed_error", code)


def _of_answer(text: Any, reason: Any, usage: Any, question: Question | None) -> Outcome:
    if question is None:
        return Outcome("unaccounted", "an answer to what cannot be asked")
    wanted = question.body["max_tokens"]
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    wrong = {
        "an answer without a finish_reason": reason not in ("stop", "length"),
        "an empty answer": not isinstance(text, str) or not text,
        f"the wrong words: {str(text)[-60:]!r}": text != question.says if question.stops else not question.says.startswith(str(text)),
        f"an answer that ends by {reason}": reason != ("stop" if question.stops else "length"),
        f"{counted} tokens where {wanted} were asked for": not question.stops and counted != wanted,
    }
    why = next((why for why, so in wrong.items() if so), "")
    return Outcome("unaccounted", why) if why else Outcome("answered", reason)
