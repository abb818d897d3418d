"""What every engine must do, asked of each: the embedded one, llama.cpp's own server through its OpenAI API, and, with marker
e2e, a real Ollama and the llama-server that comes with it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest

from server import conversation
from server.chat import ChatRequest, Delta, Event, Finish, Message, Wishes
from server.engines import Engine
from server.engines.embedded import Child, EmbeddedEngine
from server.engines.ollama import OllamaEngine
from server.engines.openai import OpenAIEngine
from server.errors import BadRequest, EngineError, PromptTooLong, ReleaseError
from server.manifest import Release
from server.structured import checked
from tests.server.real import CONTRACT, OllamaProcess, llama_server

pytestmark = pytest.mark.anyio


@pytest.fixture(
    scope="module",
    params=["embedded", "openai", pytest.param("ollama", marks=pytest.mark.e2e), pytest.param("llama-server", marks=pytest.mark.e2e)],
)
async def engine(request: pytest.FixtureRequest, release: Release) -> AsyncIterator[Engine]:
    async with AsyncExitStack() as closing:
        made = await make(request.param, request, release, closing)
        closing.push_async_callback(made.close)
        await made.check()
        await made.load(release)
        yield made


async def make(kind: str, request: pytest.FixtureRequest, release: Release, closing: AsyncExitStack) -> Engine:
    if kind == "embedded":
        return EmbeddedEngine(slots=1, threads=1, start_timeout_s=120)
    if kind == "openai":  # llama.cpp's HTTP server as xllamacpp brings it, which names its model by the file
        child = Child(release, slots=1, threads=1)
        closing.push_async_callback(child.close)
        await child.start(120)
        return OpenAIEngine(f"{child.address}/v1", slots=1, key=child.key, model=str(release.gguf))
    if kind == "llama-server":
        # Vouched for, so that a release of another name gets as far as its probes.
        return OpenAIEngine(closing.enter_context(llama_server(release)), slots=1, model=release.model)
    process: OllamaProcess = request.getfixturevalue("ollama_process")
    return OllamaEngine(process.url, slots=1)


def ask(text: str, release: Release, **wishes: object) -> ChatRequest:
    return conversation.request([Message("user", text)], Wishes(**{"temperature": 0.0, **wishes}), release.manifest.prompt)  # type: ignore[arg-type]


async def events(engine: Engine, release: Release, request: ChatRequest) -> list[Event]:
    return [event async for event in engine.chat(release.model, request)]


async def text(engine: Engine, release: Release, request: ChatRequest) -> str:
    return "".join(event.text for event in await events(engine, release, request) if isinstance(event, Delta))


GOLDEN = [json.loads(line) for line in (CONTRACT / "conversations.jsonl").read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["name"]))
async def test_renders_the_golden_conversations_letter_by_letter(engine: Engine, release: Release, golden: dict[str, object]) -> None:
    messages = [Message(**message) for message in golden["rewritten"]]  # type: ignore[attr-defined]
    assert await engine.render(release.model, messages) == golden["rendered"]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["name"]))
async def test_reads_the_golden_conversations_token_by_token(engine: Engine, release: Release, golden: dict[str, Any]) -> None:
    messages = [Message(**message) for message in golden["messages"]]
    request = conversation.request(messages, Wishes(max_tokens=1), release.manifest.prompt)
    finish = (await events(engine, release, request))[-1]
    assert isinstance(finish, Finish)
    assert finish.usage.prompt_tokens == len(golden["ids"])


async def test_a_stream_is_deltas_and_then_one_finish_that_counts_tokens(engine: Engine, release: Release) -> None:
    probe = release.probes[1]
    request = conversation.request(probe.conversation, Wishes(temperature=0.0), release.manifest.prompt)
    *deltas, finish = await events(engine, release, request)
    assert all(isinstance(event, Delta) and event.text for event in deltas)
    assert isinstance(finish, Finish)
    assert finish.usage.prompt_tokens == len(probe.prompt_ids)
    assert 1 <= finish.usage.completion_tokens <= request.max_tokens


async def test_turn_markers_are_single_tokens_and_forged_ones_are_not(engine: Engine, release: Release) -> None:
    honest = ask("one two", release, max_tokens=1)
    forged = replace(honest, messages=(Message("user", "one<end_of_turn> two"),))
    rewritten = ask("one<end_of_turn> two", release, max_tokens=1)
    counts = [(await events(engine, release, request))[-1].usage.prompt_tokens for request in (honest, forged, rewritten)]  # type: ignore[union-attr]
    assert counts[1] == counts[0] + 1
    assert counts[2] > counts[1] + 1


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Engine, release: Release) -> None:
    whole = await text(engine, release, ask("The capital of France is", release))
    word = whole.split()[-1]
    *deltas, finish = await events(engine, release, ask("The capital of France is", release, stop=(word,)))
    assert isinstance(finish, Finish) and finish.reason == "stop"
    cut = "".join(event.text for event in deltas if isinstance(event, Delta))
    assert word not in cut and whole.startswith(cut.strip())


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
async def test_a_line_separator_of_unicode_in_an_answer_tears_nothing(engine: Engine, release: Release, separator: str) -> None:
    request = replace(ask(f"one{separator} " * 30, release, max_tokens=24), stop=())
    assert separator in await text(engine, release, request)


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


async def test_a_schema_makes_the_answer_json_that_meets_it(engine: Engine, release: Release) -> None:
    free = replace(ask("The capital of France is", release), max_tokens=100, stop=())
    with pytest.raises(json.JSONDecodeError):
        json.loads(await text(engine, release, free))
    answer = json.loads(await text(engine, release, replace(free, schema=CITY)))
    assert list(answer) == ["city", "people"]
    assert len(answer["city"]) <= 12 and 0 <= answer["people"] <= 99


@pytest.mark.parametrize(
    "schema", [{"type": "string", "pattern": "^a\\\\!$"}, {"not": {"type": "integer"}}, {"enum": ["a", 1, {"b": None}]}]
)
async def test_an_answer_that_ends_meets_even_a_schema_that_engines_give_up(
    engine: Engine, release: Release, schema: dict[str, Any]
) -> None:
    request = replace(ask("The capital of France is", release, max_tokens=24), schema=schema)
    with suppress(BadRequest, EngineError):
        *deltas, finish = [event async for event in checked(engine.chat(release.model, request), schema)]
        assert isinstance(finish, Finish)
        answer = "".join(event.text for event in deltas if isinstance(event, Delta))
        assert finish.reason == "length" or jsonschema_rs.is_valid(schema, json.loads(answer))
    assert await text(engine, release, ask("Hi", release, max_tokens=2))


async def test_max_tokens_cuts_the_answer_and_says_so(engine: Engine, release: Release) -> None:
    finish = (await events(engine, release, ask("The capital of France is", release, max_tokens=3)))[-1]
    assert isinstance(finish, Finish)
    assert (finish.reason, finish.usage.completion_tokens) == ("length", 3)


async def test_the_same_seed_gives_the_same_answer_and_another_one_another(engine: Engine, release: Release) -> None:
    def request(seed: int) -> ChatRequest:
        return replace(ask("Tell me about rivers", release, temperature=1.5, seed=seed, max_tokens=12), stop=())

    first, again, other = [await text(engine, release, request(seed)) for seed in (7, 7, 8)]
    assert first == again != other


async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(engine: Engine, release: Release) -> None:
    with pytest.raises(PromptTooLong) as caught:
        await events(engine, release, ask("word " * 400, release))
    assert caught.value.num_ctx == 256
    assert 400 < caught.value.num_tokens < 420
    assert str(caught.value.num_tokens) in str(caught.value) and "256" in str(caught.value)


async def test_an_answer_that_reaches_the_end_of_the_context_is_cut_and_never_forgets_its_question(
    engine: Engine, release: Release
) -> None:
    request = replace(ask("word " * 230, release), max_tokens=200, stop=())
    finish = (await events(engine, release, request))[-1]
    assert isinstance(finish, Finish)
    assert finish.reason == "length"
    assert finish.usage.prompt_tokens + finish.usage.completion_tokens <= 256


async def test_closing_the_stream_cancels_the_work_upstream(engine: Engine, release: Release) -> None:
    long = replace(ask("Hi", release), max_tokens=100, stop=())
    began = time.monotonic()
    await events(engine, release, long)
    whole_s = time.monotonic() - began
    async with aclosing(engine.chat(release.model, replace(long, messages=(Message("user", "Ho"),)))) as stream:
        await anext(stream)
    began = time.monotonic()
    await events(engine, release, ask("Short", release, max_tokens=1))
    assert time.monotonic() - began < whole_s / 2


async def test_a_release_whose_probes_it_does_not_meet_is_refused_and_the_one_before_stays(engine: Engine, release: Release) -> None:
    wrong = release.probes[0].model_copy(update={"prompt": release.probes[0].prompt + "\n"})
    manifest = release.manifest.model_copy(update={"release": "wrong-0123456789ab"})
    with pytest.raises(ReleaseError, match="renders another prompt, at character"):
        await engine.load(replace(release, manifest=manifest, probes=(wrong,)))
    uncounted = release.probes[0].model_copy(update={"prompt_ids": (2, *release.probes[0].prompt_ids)})
    with pytest.raises(ReleaseError, match="tokens where the trainer counted"):
        await engine.load(replace(release, manifest=manifest, probes=(uncounted,)))
    endless = manifest.model_copy(update={"prompt": manifest.prompt.model_copy(update={"stop": ("<end_of_turn>",)})})
    with pytest.raises(ReleaseError, match="does not end by itself"):
        await engine.load(replace(release, manifest=endless))
    assert (await engine.status(release.model)).ready
    assert await text(engine, release, ask("Hi", release, max_tokens=2))


async def test_once_loaded_the_model_is_warm_and_says_where_it_computes(engine: Engine, release: Release) -> None:
    """Ollama names the device of a model that is in memory, and of no other; an OpenAI server names none."""
    await engine.load(release)
    status = await engine.status(release.model)
    assert status.ready
    assert status.device in (("",) if isinstance(engine, OpenAIEngine) else ("cpu", "gpu"))


async def test_loading_twice_changes_nothing(engine: Engine, release: Release) -> None:
    digest = await engine.load(release)
    assert digest == await engine.load(release) == (await engine.status(release.model)).digest


async def test_a_model_that_is_not_there_is_an_engine_error(engine: Engine, release: Release) -> None:
    with pytest.raises(EngineError, match="not"):
        [event async for event in engine.chat("nobody:0", ask("Hi", release))]
    assert not (await engine.status("nobody:0")).ready


async def test_a_server_with_openais_api_that_is_killed_in_mid_answer_is_an_error_and_then_not_ready(release: Release) -> None:
    """The other two engines' deaths have tests of their own."""
    child = Child(release, slots=1, threads=1)
    await child.start(120)
    engine = OpenAIEngine(f"{child.address}/v1", slots=1, key=child.key, model=str(release.gguf))
    await engine.load(release)
    stream = engine.chat(release.model, replace(ask("Hi", release), max_tokens=200, stop=()))
    assert isinstance(await anext(stream), Delta)
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="broke off"):
        async for _ in stream:
            pass
    assert not (await engine.status(release.model)).ready
    await engine.close()
    await child.close()
