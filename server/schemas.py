"""The bodies of requests, and of replies for /openapi.json. /chat is ours and closed: a typing error is an error. /v1 is OpenAI's and open: what would change
nothing is ignored, and what would change the answer and is not here is refused by name. Types are taken at their word: "1" is no 1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator


def _text(content: Any) -> Any:
    """OpenAI's list of content parts as one text; a part that is no text is refused by its type."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} is {kind!r}: this model reads text only")
    return "".join(part["text"] for part in content)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_PARTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
_STOPS = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
    ]
}

Text = Annotated[str, BeforeValidator(_text), WithJsonSchema(_PARTS)]
Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[
    tuple[Stop, ...],
    BeforeValidator(lambda stop: (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop),
    Field(max_length=16),
    WithJsonSchema(_STOPS),
]

CLOSED = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="forbid", use_attribute_docstrings=True)
OPEN = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore", use_attribute_docstrings=True)


def _only(name: str, kind: str) -> dict[str, Any]:
    """JSON Schema of `either message or messages`, one half of it: a null is as good as nothing."""
    nothing = {other: {"type": "null"} for other in ("message", "messages") if other != name}
    return {"required": [name], "properties": {name: {"type": kind}, **nothing}}


class Sampling(BaseModel):
    """What both dialects may wish, in numbers that every engine can hold. What is left out is as the release has it."""

    max_tokens: int | None = Field(None, ge=1)
    """Longest answer, tokens."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 takes the likeliest token every time."""
    top_k: int | None = Field(None, ge=0, lt=2**31)
    """Only the so many likeliest tokens; 0: all."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Only the likeliest tokens that together are so likely."""
    min_p: float | None = Field(None, ge=0, lt=1)
    """Only tokens at least so likely, relative to the likeliest."""
    repeat_penalty: float | None = Field(None, gt=0)
    """Over 1: tokens that occurred lately become less likely."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """The same seed gives the same answer on the same engine."""
    stop: Stops | None = None
    """Text that ends the answer and is not part of it, or several of them."""


class SimpleMessage(BaseModel):
    model_config = CLOSED

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatBody(Sampling):
    """`{"message": "..."}`, or the conversation so far in `messages`: an optional system message, then user and assistant in turn."""

    model_config = CLOSED | ConfigDict(json_schema_extra={"oneOf": [_only("message", "string"), _only("messages", "array")]})

    message: str | None = None
    """One question, without a history."""
    messages: tuple[SimpleMessage, ...] | None = Field(None, min_length=1)
    """The whole conversation, ending with the user's message to answer: the server keeps none."""
    system: str | None = None
    """What the model is told beforehand; the same as a first message of role system."""
    model: str | None = None
    """The served one, by name; may be left out."""
    stream: bool | None = None
    """Server-sent events instead of one JSON object; Accept: text/event-stream does the same."""

    @model_validator(mode="after")
    def _one_conversation(self) -> ChatBody:
        if (self.message is None) == (self.messages is None):
            raise ValueError('give either "message" (one text) or "messages" (a list of role and content)')
        if self.system is not None and self.messages is not None and self.messages[0].role == "system":
            raise ValueError('"system" and a system message in "messages" are one too many')
        return self


class OpenAIMessage(BaseModel):
    model_config = OPEN

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    """One text, or text parts, which are joined."""
    tool_calls: None = None
    function_call: None = None


class StreamOptions(BaseModel):
    model_config = OPEN

    include_usage: bool = False
    """A last chunk that counts tokens."""


class AsText(BaseModel):
    model_config = OPEN

    type: Literal["text"]


class JsonSchema(BaseModel):
    model_config = OPEN

    body: dict[str, Any] = Field(alias="schema")
    """What the answer must meet; engines know most of JSON Schema, and say which keyword they do not."""


class AsJson(BaseModel):
    model_config = OPEN

    type: Literal["json_schema"]
    json_schema: JsonSchema


class CompletionBody(Sampling):
    """OpenAI's chat completion, as far as a text model can serve it. Further fields are ignored where they change nothing, and
    refused by name where they would: tools, n over 1, logprobs, penalties and their like."""

    model_config = OPEN | ConfigDict(extra="allow", json_schema_extra=lambda schema: schema["properties"].update(_refused()))

    model: str | None = None
    """The served one, by name; may be left out."""
    messages: tuple[OpenAIMessage, ...] = Field(min_length=1)
    """An optional system or developer message, then user and assistant in turn, ending with the user's."""
    stream: bool | None = None
    """Server-sent events, ending in [DONE]."""
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name of max_tokens, which it goes before."""
    response_format: Annotated[AsText | AsJson, Field(discriminator="type")] | None = None
    """Text, or JSON that meets a schema."""

    @model_validator(mode="after")
    def _servable(self) -> CompletionBody:
        unknown = self.model_extra or {}
        if refused := [name for name in REFUSED if not _is_harmless(name, unknown.get(name))]:
            raise ValueError(f"{', '.join(refused)}: not offered by this model; leave it out")
        return self

    @property
    def schema_wished(self) -> dict[str, Any] | None:
        return self.response_format.json_schema.body if isinstance(self.response_format, AsJson) else None


REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
}
"""Fields that would change the answer, with the values that ask for nothing."""


def _is_harmless(name: str, value: Any) -> bool:
    return any(value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in REFUSED[name])


def _refused() -> dict[str, Any]:
    return {name: {"enum": list(harmless), "description": "Nothing else is offered."} for name, harmless in REFUSED.items()}


# --- Replies: translate.py and errors.py write them, these say how they look


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


Reason = Literal["stop", "length"]


class Usage(Reply):
    """Tokens; the prompt's with <bos>."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str


class ChatReply(Reply):
    id: str
    model: str
    message: AnswerMessage
    finish_reason: Reason
    """stop: the model ended it; length: it was cut."""
    usage: Usage


class Piece(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatEvent(Reply):
    """Deltas, then one event with finish_reason and usage."""

    id: str
    model: str
    delta: Piece
    finish_reason: Reason | None = None
    usage: Usage | None = None


class CompletionMessage(AnswerMessage):
    refusal: None


class Choice(Reply):
    index: Literal[0]
    message: CompletionMessage
    logprobs: None
    finish_reason: Reason


class CompletionReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: tuple[Choice, ...] = Field(min_length=1, max_length=1)
    usage: Usage


class ChunkChoice(Reply):
    index: Literal[0]
    delta: Piece
    logprobs: None
    finish_reason: Reason | None


class CompletionChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: tuple[ChunkChoice, ...] = Field(max_length=1)
    """Empty in the last chunk, which counts tokens if it was asked for."""
    usage: Usage | None = None


class Provenance(Reply):
    release: str
    created: str
    base: dict[str, Any]
    """The model that was tuned: name, revision, hash."""
    adapter: dict[str, Any]
    """What tuned it: rank, alpha, DoRA, rsLoRA, context."""
    quantization: str
    sha256: str
    """Of the GGUF."""
    num_ctx: int
    """Context, tokens: conversation and answer together."""
    engine: Literal["embedded", "ollama", "openai"]
    device: Literal["cpu", "gpu", "cpu and gpu", ""]
    """Empty: the engine does not say."""


class ModelEntry(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    trinity: Provenance


class ModelList(Reply):
    object: Literal["list"]
    data: tuple[ModelEntry, ...]


class Alive(Reply):
    status: Literal["ok"]


class Ready(Reply):
    status: Literal["ready"]
    model: str | None = None
    """This and the next are told to who has a key, where keys are wanted."""
    engine: str | None = None
    """One line about it: version and place."""


class Problem(Reply):
    message: str
    """What is wrong and how to mend it."""
    type: str
    code: str
    """For programs: does not change."""
    request_id: str
    """The reply's X-Request-ID; the server's log knows it."""


class ErrorReply(Reply):
    error: Problem
