"""The bodies of requests. /chat is ours and closed: a typing error is an error. /v1 is OpenAI's and open: what would change
nothing is ignored, and what would change the answer and is not here is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _text(content: Any) -> Any:
    """OpenAI's list of content parts as one text; a part that is no text is refused by its type."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} is {kind!r}: this model reads text only")
    return "".join(part["text"] for part in content)


Text = Annotated[str, BeforeValidator(_text)]
Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[tuple[Stop, ...], BeforeValidator(lambda stop: (stop,) if isinstance(stop, str) else stop), Field(max_length=16)]


class Sampling(BaseModel):
    """What both dialects may wish, in numbers that every engine can hold."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, lt=1)
    repeat_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=0, lt=2**31)
    stop: Stops | None = None


class SimpleMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatBody(Sampling):
    """`{"message": "..."}`, or the conversation so far in `messages`."""

    model_config = ConfigDict(extra="forbid")

    message: str | None = None
    messages: tuple[SimpleMessage, ...] | None = Field(None, min_length=1)
    system: str | None = None
    model: str | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _one_conversation(self) -> ChatBody:
        if (self.message is None) == (self.messages is None):
            raise ValueError('give either "message" (one text) or "messages" (a list of role and content)')
        if self.system is not None and self.messages is not None and self.messages[0].role == "system":
            raise ValueError('"system" and a system message in "messages" are one too many')
        return self


class OpenAIMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    tool_calls: None = None
    function_call: None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    include_usage: bool = False


class CompletionBody(Sampling):
    """OpenAI's chat completion, as far as a text model can serve it, and the wishes that it has not."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: tuple[OpenAIMessage, ...] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _servable(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and (refused := [name for name, harmless in REFUSED.items() if tree.get(name) not in harmless]):
            raise ValueError(f"{', '.join(refused)}: not offered by this model; leave it out")
        return tree


REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
}
"""Fields that would change the answer, with the values that ask for nothing."""
