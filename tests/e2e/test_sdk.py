"""OpenAI's own Python SDK, and curl, against the gateway in front of every engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from server.chat import Delta, Finish, Usage
from server.errors import EngineError
from server.manifest import Release
from tests.server.real import GatewayProcess
from tests.server.scripted import HELLO, ScriptedEngine, serving, small_release, sse

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]


@pytest.fixture
def client(each_engine: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{each_engine.url}/v1", api_key="none-needed") as made:
        yield made


@pytest.fixture
async def async_client(each_engine: GatewayProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{each_engine.url}/v1", api_key="none-needed") as made:
        yield made


@pytest.fixture
def question(demo_release: Release) -> str:
    return demo_release.probes[0].messages[-1].content


def test_a_completion_whole_and_in_a_stream(client: openai.OpenAI, question: str) -> None:
    whole = client.chat.completions.create(model="trinity", messages=[{"role": "user", "content": question}], temperature=0)
    assert whole.choices[0].finish_reason == "stop" and whole.usage and whole.usage.total_tokens > 2
    stream = client.chat.completions.create(
        model="trinity",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage.model_copy() and not chunks[-1].choices


async def test_several_at_once_without_waiting_for_each_other(async_client: openai.AsyncOpenAI, question: str) -> None:
    create = async_client.chat.completions.create
    calls = [create(model="trinity", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=8) for _ in range(3)]
    assert len({answer.choices[0].message.content for answer in await asyncio.gather(*calls)}) == 1
    text = ""
    async for chunk in await create(
        model="trinity", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=8, stream=True
    ):
        text += chunk.choices[0].delta.content or ""
    assert (
        text
        == (await create(model="trinity", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=8))
        .choices[0]
        .message.content
    )


def test_the_list_of_models_says_where_the_model_comes_from(client: openai.OpenAI, demo_release: Release) -> None:
    (model,) = client.models.list().data
    extra = model.model_extra or {}
    assert model.id == demo_release.manifest.name
    assert (extra["trinity"]["release"], extra["trinity"]["num_ctx"]) == (
        demo_release.manifest.release,
        demo_release.manifest.prompt.num_ctx,
    )
    assert extra["trinity"]["base"]["name"] and extra["trinity"]["adapter"]["rank"]


class Meal(BaseModel):
    dish: Literal["soup", "bread"]
    is_hot: bool


def test_a_pydantic_model_comes_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="trinity", messages=[{"role": "user", "content": "What is for dinner?"}], response_format=Meal, max_tokens=64
    )
    assert isinstance(answer.choices[0].message.parsed, Meal)


def test_errors_are_the_sdk_s_own_with_message_code_and_request_id(client: openai.OpenAI, demo_release: Release) -> None:
    ask = client.with_options(max_retries=0).chat.completions.create
    with pytest.raises(openai.BadRequestError, match="tools") as tools:
        ask(model="trinity", messages=[{"role": "user", "content": "Hi"}], tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError, match="there is 'trinity'") as unknown:
        ask(model="gpt-9", messages=[{"role": "user", "content": "Hi"}])
    num_ctx = demo_release.manifest.prompt.num_ctx
    with pytest.raises(openai.BadRequestError, match=str(num_ctx)) as long:
        ask(model="trinity", messages=[{"role": "user", "content": "word " * (num_ctx + 10)}], stream=True)
    assert [error.value.code for error in (tools, unknown, long)] == ["bad_request", "model_not_found", "context_length_exceeded"]
    assert all(error.value.request_id for error in (tools, unknown, long))


async def test_a_stream_that_breaks_off_raises(tmp_path: Path) -> None:
    small_release(tmp_path)
    async with (
        serving(ScriptedEngine([Delta("Hel"), EngineError("gone")]), tmp_path) as http,
        openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="x") as client,
    ):
        stream = await client.chat.completions.create(model="trinity", messages=[{"role": "user", "content": "Hi"}], stream=True)
        seen = []
        with pytest.raises(openai.APIError, match="gone") as caught:
            async for chunk in stream:
                seen.append(chunk.choices[0].delta.content)  # noqa: PERF401  # it must be there when the loop raises
    assert (seen, caught.value.code) == (["", "Hel"], "engine_failed")


async def test_a_refusal_for_want_of_room_is_retried_when_it_says_so(tmp_path: Path) -> None:
    small_release(tmp_path)
    engine = ScriptedEngine([Delta("a"), 1.0, Finish("stop", Usage(1, 1))])
    async with (
        serving(engine, tmp_path, waiting=0) as http,
        openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="x") as client,
    ):
        create = client.chat.completions.with_raw_response.create
        stream = await client.chat.completions.create(model="trinity", messages=[{"role": "user", "content": "1"}], stream=True)
        await anext(aiter(stream))
        with pytest.raises(openai.InternalServerError) as refused:
            await client.with_options(max_retries=0).chat.completions.create(model="trinity", messages=[{"role": "user", "content": "2"}])
        retried = await create(model="trinity", messages=[{"role": "user", "content": "3"}])
        await stream.close()
    assert (refused.value.status_code, refused.value.code, refused.value.response.headers["retry-after"]) == (503, "queue_full", "2")
    assert retried.retries_taken == 1
    assert [request.messages[0].content for request in engine.asked] == ["1", "3"]


async def test_without_its_key_the_sdk_says_unauthorized(tmp_path: Path) -> None:
    small_release(tmp_path)
    async with (
        serving(ScriptedEngine(HELLO), tmp_path, host="0.0.0.0") as http,  # noqa: S104  # it listens on the loopback; this asks for keys
        openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="tr-wrong") as client,
    ):
        with pytest.raises(openai.AuthenticationError, match="make key") as caught:
            await client.models.list()
    assert caught.value.code == "unauthorized"


def test_curl_gets_an_answer_a_stream_and_the_line_that_works_when_it_forgot_the_content_type(
    each_engine: GatewayProcess, question: str
) -> None:
    body = json.dumps({"message": question, "max_tokens": 5})
    json_type = ("-H", "Content-Type: application/json")
    answer = json.loads(curl(f"{each_engine.url}/chat", *json_type, "-d", body))
    assert answer["message"]["content"] and answer["usage"]["completion_tokens"] <= 5
    events = sse(curl("-N", f"{each_engine.url}/chat", *json_type, "-H", "Accept: text/event-stream", "-d", body))
    assert events[-1] == "[DONE]" and events[0]["delta"]["content"]
    refused = json.loads(curl(f"{each_engine.url}/chat", "-d", body))["error"]
    assert refused["code"] == "no_json_type"
    line = refused["message"].partition("this works: ")[2]
    assert json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout)["message"]["content"]


def curl(*words: str) -> str:
    return subprocess.run(["curl", "-s", *words], capture_output=True, text=True, check=True, timeout=120).stdout
