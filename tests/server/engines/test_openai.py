"""What goes wrong between the gateway and a server with OpenAI's API, and what servers say that cannot be run here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server import conversation
from server.chat import ChatRequest, Delta, Event, Finish, Message, Usage, Wishes
from server.engines.openai import OpenAIEngine
from server.errors import BadRequest, EngineError, PromptTooLong, ReleaseError, SetupError
from server.manifest import Release, read
from tests.server.real import free_port
from tests.server.scripted import small_release

pytestmark = pytest.mark.anyio
MODEL = "trinity:small-0123456789ab"
USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
Reply = tuple[int, str]


def chunk(text: str = "", reason: str | None = None, **more: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text, 'finish_reason': reason}], **more})}\n\n"


GOOD = chunk("Hi") + chunk("", "stop") + f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\ndata: [DONE]\n\n"


class Server:
    """Answers a path as it was told to, counts nothing it was not told to, and keeps what it was asked."""

    def __init__(self, **replies: Reply) -> None:
        self.replies: dict[str, Reply] = {
            "/v1/models": (200, json.dumps({"object": "list", "data": [{"id": MODEL}]})),
            "/tokenize": (200, json.dumps({"tokens": [2, 3]})),
            "/v1/completions": (200, GOOD),
        }
        self.replies |= {f"/v1/{name}" if name != "tokenize" else "/tokenize": reply for name, reply in replies.items()}
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path = head.split()[1]
        self.keys.add(headers.get("authorization", ""))
        if path == "/v1/completions":
            self.asked.append(json.loads(body))
        status, text = self.replies[path]
        content = text.encode()
        writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(content)) + content)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def speaking(server: Server, **settings: str) -> AsyncIterator[OpenAIEngine]:
    listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    engine = OpenAIEngine(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", slots=1, **settings)
    try:
        yield engine
    finally:
        await engine.close()
        listening.close()
        await listening.wait_closed()


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return read(small_release(tmp_path))


def ask(release: Release, **wishes: Any) -> ChatRequest:
    return conversation.request([Message("user", "Hi")], Wishes(**wishes), release.manifest.prompt)


async def answer(server: Server, release: Release, request: ChatRequest | None = None) -> list[Event]:
    """One answer after a load that went well."""
    replies, server.replies = server.replies, Server().replies
    async with speaking(server) as engine:
        await engine.load(release)
        server.asked.clear()
        server.replies = replies
        return [event async for event in engine.chat(MODEL, request or ask(release))]


async def test_text_then_reason_then_count_then_done_is_an_answer(release: Release) -> None:
    assert await answer(Server(), release) == [Delta("Hi"), Finish("stop", Usage(2, 1))]


async def test_reason_and_count_may_come_together(release: Release) -> None:
    together = (200, chunk("Hi") + chunk("", "length", usage=USAGE) + "data: [DONE]\n\n")
    assert await answer(Server(completions=together), release) == [Delta("Hi"), Finish("length", Usage(2, 1))]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (chunk("Hi"), "ended before its end"),
        (chunk("Hi") + chunk("", "stop", usage=USAGE), "ended before its end"),
        (chunk("Hi") + chunk("", "stop") + "data: [DONE]\n\n", "counts no tokens"),
        (chunk("Hi") + chunk("", "abort", usage=USAGE) + "data: [DONE]\n\n", "because of 'abort'"),
        (chunk("Hi", usage=USAGE) + "data: [DONE]\n\n", "because of ''"),
        (chunk("Hi") + 'data: {"error": {"message": "EngineCore died"}}\n\n', "EngineCore died"),
        *(
            (chunk("Hi") + f"data: {line}\n\n", "says something else than it should")
            for line in (
                "<html>",
                "[]",
                "7",
                "[" * 60_000,
                '{"choices": 1}',
                '{"choices": [1]}',
                '{"choices": [{"text": 1}]}',
                '{"choices": [{"finish_reason": {}}]}',
                '{"usage": {"prompt_tokens": 1}}',
                '{"usage": {"prompt_tokens": "a", "completion_tokens": 1}}',
                '{"usage": {"prompt_tokens": 1, "completion_tokens": -1}}',
            )
        ),
    ],
)
async def test_a_stream_that_ends_otherwise_is_an_error(release: Release, stream: str, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        await answer(Server(completions=(200, stream)), release)


async def test_an_answer_never_wishes_for_more_than_the_context_has_room_for(release: Release) -> None:
    """vLLM refuses a request whose prompt and max_tokens are longer than its context together."""
    server = Server(tokenize=(200, json.dumps({"count": 4000, "max_model_len": 4096, "tokens": [2] * 4000})))
    await answer(server, release, ask(release, max_tokens=1000))
    assert server.asked[0]["max_tokens"] == 96


async def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(release: Release) -> None:
    server = Server(tokenize=(200, json.dumps({"tokens": [2] * 4096})))
    with pytest.raises(PromptTooLong) as caught:
        await answer(server, release)
    assert (caught.value.num_tokens, caught.value.num_ctx, server.asked) == (4096, 4096, [])


VLLM = (
    "This model's maximum context length is 4096 tokens. However, you requested 0 output tokens and your prompt contains at least "
    "4097 input tokens, for a total of at least 4097 tokens."
)
LLAMA_SERVER = '{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_prompt_tokens":4097,"n_ctx":4096}}'


@pytest.mark.parametrize("words", [json.dumps({"error": {"message": VLLM}}), LLAMA_SERVER], ids=["vLLM", "llama-server"])
async def test_without_a_way_to_count_the_server_s_own_refusal_is_understood(release: Release, words: str) -> None:
    with pytest.raises(PromptTooLong) as caught:
        await answer(Server(tokenize=(404, ""), completions=(400, words)), release)
    assert (caught.value.num_tokens, caught.value.num_ctx) == (4097, 4096)


@pytest.mark.parametrize(("schema", "kind"), [({"type": "string"}, BadRequest), (None, EngineError)])
async def test_a_refusal_is_the_client_s_only_where_it_brought_a_schema(
    release: Release, schema: Mapping[str, Any] | None, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="not supported by xgrammar"):
        await answer(Server(completions=(400, "not supported by xgrammar")), release, ask(release, schema=schema))


async def test_a_schema_goes_out_under_the_names_that_vllm_and_llama_cpp_give_it(release: Release) -> None:
    server = Server()
    await answer(server, release, ask(release, schema={"type": "string"}))
    assert server.asked[0]["json_schema"] == server.asked[0]["response_format"]["json_schema"]["schema"]
    assert server.asked[0]["json_schema"]["type"] == "string"


async def test_the_key_goes_along_everywhere(release: Release) -> None:
    server = Server()
    async with speaking(server, key="secret") as engine:
        await engine.check()
        await engine.load(release)
    assert server.keys == {"bearer secret"}


async def test_a_model_of_another_name_is_not_taken_for_the_release_unless_the_settings_vouch_for_it(release: Release) -> None:
    other = (200, json.dumps({"data": [{"id": "gemma-3-12b"}]}))
    async with speaking(Server(models=other)) as engine:
        with pytest.raises(EngineError, match=f"has no model {MODEL} but gemma-3-12b: start it with --served-model-name {MODEL}"):
            await engine.load(release)
        assert not (await engine.status(MODEL)).ready
    server = Server(models=other)
    async with speaking(server, model="gemma-3-12b") as engine:
        assert await engine.load(release) == (await engine.status(MODEL)).digest == "gemma-3-12b"
        assert server.asked[0]["model"] == "gemma-3-12b"


async def test_a_release_whose_probes_are_not_met_stays_unloaded(release: Release) -> None:
    async with speaking(Server(completions=(200, GOOD.replace('"prompt_tokens": 2', '"prompt_tokens": 3')))) as engine:
        with pytest.raises(ReleaseError, match="reads 3 tokens where the trainer counted 2"):
            await engine.load(release)
        with pytest.raises(EngineError, match="is not loaded"):
            [event async for event in engine.chat(MODEL, ask(release))]


async def test_a_model_that_answers_goes_on_when_it_fails_its_probes_the_second_time(release: Release) -> None:
    server = Server()
    async with speaking(server) as engine:
        await engine.load(release)
        server.replies["/v1/completions"] = (200, GOOD.replace('"prompt_tokens": 2', '"prompt_tokens": 3'))
        with pytest.raises(ReleaseError):
            await engine.load(release)
        assert isinstance([event async for event in engine.chat(MODEL, ask(release))][-1], Finish)


async def test_a_model_that_went_away_is_not_ready(release: Release) -> None:
    server = Server()
    async with speaking(server) as engine:
        await engine.load(release)
        assert (await engine.status(MODEL)).ready
        server.replies["/v1/models"] = (200, json.dumps({"data": []}))
        status = await engine.status(MODEL)
    assert not status.ready and "no longer has" in status.detail
    status = await OpenAIEngine("http://127.0.0.1:1/v1", slots=1).status(MODEL)
    assert not status.ready


async def test_nobody_there_is_one_clear_line_before_the_start() -> None:
    engine = OpenAIEngine(f"http://127.0.0.1:{free_port()}/v1", slots=1)
    with pytest.raises(SetupError, match=r"no OpenAI API answers at .*: start it, name another place with --openai-url"):
        await engine.check()
    await engine.close()


@pytest.mark.parametrize("models", [(401, "no key"), (200, "<html>"), (200, "[]")])
async def test_what_is_no_openai_api_is_one_clear_line_before_the_start(models: Reply) -> None:
    async with speaking(Server(models=models)) as engine:
        with pytest.raises(
            SetupError, match=r"^.*(answers 401: no key|no OpenAI API).*: start it, name another place with --openai-url.*$"
        ):
            await engine.check()
