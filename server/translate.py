"""Pure: client JSON -> conversation and wishes, events -> JSON or server-sent events. Knows no engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from server.chat import Delta, Event, Finish, Message, Usage, Wishes
from server.errors import UnknownModel
from server.manifest import Release
from server.schemas import ChatBody, CompletionBody, Sampling

DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"


class Asked(NamedTuple):
    """A request without its dialect."""

    messages: tuple[Message, ...]
    wishes: Wishes
    stream: bool
    model: str | None


def chat(body: ChatBody, wants_events: bool) -> Asked:
    """`wants_events`: the client accepts text/event-stream; the body's `stream` goes before it."""
    messages = [Message(item.role, item.content) for item in body.messages or ()] or [Message("user", body.message or "")]
    if body.system is not None:
        messages.insert(0, Message("system", body.system))
    return Asked(tuple(messages), _wishes(body, body.max_tokens), wants_events if body.stream is None else body.stream, body.model)


def completion(body: CompletionBody) -> Asked:
    messages = tuple(Message("system" if item.role == "developer" else item.role, item.content) for item in body.messages)
    wishes = replace(_wishes(body, body.max_completion_tokens or body.max_tokens), schema=body.schema_wished)
    return Asked(messages, wishes, bool(body.stream), body.model)


def _wishes(body: Sampling, max_tokens: int | None) -> Wishes:
    return Wishes(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repeat_penalty=body.repeat_penalty,
        seed=body.seed,
        stop=body.stop or (),
    )


def check_model(name: str | None, release: Release) -> None:
    """A client may name the model with or without its release, or not at all."""
    own = release.manifest.name
    if name not in (None, "", own, f"{own}:latest", release.model):
        raise UnknownModel(f"model {name!r} is not served here; there is {own!r}")


class Whole(NamedTuple):
    """An answer that is complete."""

    text: str
    finish: Finish


def whole(events: Sequence[Event]) -> Whole:
    finish = events[-1]
    assert isinstance(finish, Finish)
    return Whole("".join(event.text for event in events if isinstance(event, Delta)), finish)


def usage(counts: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }


def chat_reply(id: str, model: str, answer: Whole) -> dict[str, Any]:
    return {
        "id": id,
        "model": model,
        "message": {"role": "assistant", "content": answer.text},
        "finish_reason": answer.finish.reason,
        "usage": usage(answer.finish.usage),
    }


def completion_reply(id: str, model: str, created: int, answer: Whole) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": None,
        "finish_reason": answer.finish.reason,
    }
    head = {"id": id, "object": "chat.completion", "created": created, "model": model}
    return {**head, "choices": [choice], "usage": usage(answer.finish.usage)}


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would make one an event


def sse(tree: Mapping[str, Any]) -> str:
    return f"data: {_encode(tree)}\n\n"


Writer = Callable[[Event], str]
"""One event as the text of server-sent events; the text of a Finish includes [DONE]."""


def chat_events(id: str, model: str) -> Writer:
    head = {"id": id, "model": model}

    def write(event: Event) -> str:
        if isinstance(event, Delta):
            return sse({**head, "delta": {"content": event.text}})
        return sse({**head, "delta": {}, "finish_reason": event.reason, "usage": usage(event.usage)}) + DONE

    return write


def completion_events(id: str, model: str, created: int, include_usage: bool) -> tuple[str, Writer]:
    """OpenAI's chunks: the opening one with the role, and the writer of the rest."""
    head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}

    def chunk(delta: Mapping[str, str], reason: str | None = None) -> str:
        return sse({**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})

    def write(event: Event) -> str:
        if isinstance(event, Delta):
            return chunk({"content": event.text})
        last = sse({**head, "choices": [], "usage": usage(event.usage)}) if include_usage else ""
        return chunk({}, event.reason) + last + DONE

    return chunk({"role": "assistant", "content": ""}), write


def models(release: Release, engine: str, device: str) -> dict[str, Any]:
    """OpenAI's list of models: the one that is served, with where it comes from and what computes it."""
    manifest = release.manifest
    provenance = {
        "release": manifest.release,
        "created": manifest.created.isoformat(),
        "base": manifest.base,
        "adapter": manifest.adapter,
        "quantization": manifest.quantization,
        "sha256": release.sha256,
        "num_ctx": manifest.prompt.num_ctx,
        "engine": engine,
        "device": device,
    }
    head = {"id": manifest.name, "object": "model", "created": int(manifest.created.timestamp()), "owned_by": "trinity"}
    return {"object": "list", "data": [{**head, "trinity": provenance}]}
