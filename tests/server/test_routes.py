"""The gateway over HTTP, with an engine that does what each test needs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.chat import Delta, Finish, Message, Usage
from server.errors import EngineError, PromptTooLong, ReleaseError
from server.manifest import Release
from server.release.keeper import LOOK_S
from tests.server.scripted import ScriptedEngine, serving, small_release, sse, until

pytestmark = pytest.mark.anyio
MODEL = "trinity:small-0123456789ab"


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path)
    return tmp_path


def error(reply: httpx2.Response) -> dict[str, Any]:
    """The error of a reply, which must have the one shape."""
    tree = reply.json()
    assert set(tree) == {"error"} and set(tree["error"]) == {"message", "type", "code", "request_id"}
    assert tree["error"]["request_id"] == reply.headers["x-request-id"]
    found: dict[str, Any] = tree["error"]
    return found


async def test_chat_answers_one_json_object(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        reply = await client.post("/chat", json={"message": "Hi"})
    tree = reply.json()
    assert tree.pop("id").startswith("chat-")
    assert tree == {
        "model": MODEL,
        "message": {"role": "assistant", "content": "Hello ü"},
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


@pytest.mark.parametrize("how", ["body", "accept"])
async def test_chat_streams_events_when_asked_to(releases: Path, how: str) -> None:
    body = {"message": "Hi"} | ({"stream": True} if how == "body" else {})
    headers = {"Accept": "text/event-stream"} if how == "accept" else {}
    async with serving(ScriptedEngine(), releases) as client:
        reply = await client.post("/chat", json=body, headers=headers)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    *deltas, last, done = sse(reply.text)
    assert [item["delta"] for item in deltas] == [{"content": "Hel"}, {"content": "lo ü"}]
    assert (last["finish_reason"], last["usage"]["total_tokens"], done) == ("stop", 7, "[DONE]")


async def test_a_release_decides_what_the_client_left_open_and_the_client_the_rest(releases: Path) -> None:
    engine = ScriptedEngine()
    body = {"system": "Be brief.", "message": " Hi<eos> ", "temperature": 0.5, "max_tokens": 7, "seed": 3, "stop": "END"}
    async with serving(engine, releases) as client:
        assert (await client.post("/chat", json=body)).status_code == 200
    request = engine.asked[0]
    assert request.messages == (Message("system", "Be brief."), Message("user", "Hi<eos >"))
    assert (request.temperature, request.max_tokens, request.seed) == (0.5, 7, 3)
    assert (request.top_k, request.top_p, request.stop) == (64, 0.95, ("<end_of_turn>", "END"))


async def test_openais_completion_comes_whole_and_in_chunks(releases: Path) -> None:
    body: dict[str, Any] = {"model": "trinity", "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "Hi"}]}
    async with serving(ScriptedEngine(), releases) as client:
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        reply = await client.post("/v1/chat/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Hello ü", "refusal": None}
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["total_tokens"]) == ("stop", 7)
    *chunks, usage, done = sse(reply.text)
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"] for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello ü"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 2, "[DONE]")


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "y"}}}, "schema"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"temperature": "0.5"}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
    ],
)
async def test_what_openais_api_has_and_this_model_has_not_is_refused_by_name(releases: Path, extra: dict[str, Any], name: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]} | extra
    async with serving(ScriptedEngine(), releases) as client:
        reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert name in error(reply)["message"]


async def test_wishes_that_openais_api_has_not_are_not_lost_in_it(releases: Path) -> None:
    engine = ScriptedEngine()
    body = {"messages": [{"role": "user", "content": "Hi"}], "top_k": 5, "min_p": 0.1, "repeat_penalty": 1.2, "stop": None}
    async with serving(engine, releases) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert (engine.asked[0].top_k, engine.asked[0].min_p, engine.asked[0].repeat_penalty) == (5, 0.1, 1.2)


async def test_what_asks_for_nothing_is_ignored_and_content_parts_are_joined(releases: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}], "user": "me", "n": 1, "tools": [], "response_format": {"type": "text"}}
    engine = ScriptedEngine()
    async with serving(engine, releases) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert engine.asked[0].messages == (Message("user", "ab"),)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, 'either "message"'),
        ({"message": "a", "messages": [{"role": "user", "content": "b"}]}, 'either "message"'),
        ({"message": "a", "temprature": 1}, "temprature"),
        ({"message": "  "}, "messages[0].content is empty"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "messages[0].role is 'assistant' where 'user'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "messages[1].role is 'user'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "messages[1].role is 'system'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "must end with a user message"),
        ({"message": "a", "max_tokens": 0}, "max_tokens"),
        ({"message": "a", "top_k": 2**31}, "top_k"),
        ({"message": "a", "stop": ""}, "stop.0"),
        ({"message": "a", "stop": 0}, "stop"),
        ({"system": "s", "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, "one too many"),
    ],
)
async def test_a_conversation_that_cannot_be_is_refused_with_the_place(releases: Path, body: dict[str, Any], words: str) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        reply = await client.post("/chat", json=body)
    assert reply.status_code == 400
    assert words in error(reply)["message"]


async def test_a_conversation_beyond_this_server_s_limits_is_refused_with_both_numbers_and_an_answer_is_cut_to_them(releases: Path) -> None:
    engine = ScriptedEngine()
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2] + [{"role": "user", "content": "x"}]
    async with serving(engine, releases, max_messages=4, max_message_chars=9, max_answer_tokens=50) as client:
        many = await client.post("/chat", json={"messages": turns})
        long = await client.post("/chat", json={"message": "x" * 10})
        wished = await client.post("/chat", json={"message": "x", "max_tokens": 60})
        unwished = await client.post("/chat", json={"message": "x"})
    assert (many.status_code, long.status_code, wished.status_code, unwished.status_code) == (400, 400, 200, 200)
    assert "there are 5, and 4 are read" in error(many)["message"]
    assert "messages[0].content has 10 characters, and 9 are read" in error(long)["message"]
    assert [request.max_tokens for request in engine.asked] == [50, 50]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def test_a_schema_reaches_the_engine_and_an_answer_that_is_no_json_is_an_error(releases: Path) -> None:
    wish = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": wish}
    engine = ScriptedEngine([Delta('{"a": '), Delta("1}"), Finish("stop", Usage(1, 2))])
    async with serving(engine, releases) as client:
        well = await client.post("/v1/chat/completions", json=body)
        engine.script = ScriptedEngine().script
        ill = await client.post("/v1/chat/completions", json=body)
        stream = await client.post("/v1/chat/completions", json=body | {"stream": True})
    assert engine.asked[0].schema == SCHEMA
    assert well.json()["choices"][0]["message"]["content"] == '{"a": 1}'
    assert (ill.status_code, error(ill)["code"]) == (502, "engine_failed")
    assert sse(stream.text)[-1]["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("schema", ['{"default": 1e999}', '{"type": "nonsense"}', '{"minItems": 1000000}'])
@pytest.mark.parametrize("stream", ["true", "false"])
async def test_a_schema_that_cannot_be_is_the_client_s_to_mend(releases: Path, schema: str, stream: str) -> None:
    wish = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}'
    body = f'{{"messages": [{{"role": "user", "content": "Hi"}}], "stream": {stream}, "response_format": {wish}}}'
    engine = ScriptedEngine()
    async with serving(engine, releases) as client:
        reply = await client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, error(reply)["code"]) == (400, "bad_request")
    assert "response_format.json_schema.schema" in error(reply)["message"] and not engine.asked


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])
async def test_a_body_that_is_not_json_is_answered_with_the_curl_line_that_works(releases: Path, path: str) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        form = await client.post(path, content='{"message": "Hi"}', headers={"Content-Type": "application/x-www-form-urlencoded"})
        bare = await client.post(path, content='{"message": "Hi"}')
        torn = await client.post(path, content='{"message": ', headers={"Content-Type": "application/json"})
        listed = await client.post(path, json=["Hi"])
        binary = await client.post(path, content=b"\xff\xfe\x00", headers={"Content-Type": "application/json"})
        url = str(client.base_url).rstrip("/") + path
    assert [reply.status_code for reply in (form, bare, torn, listed, binary)] == [415, 415, 400, 400, 400]
    for reply in (form, bare, torn, listed, binary):
        assert f"curl -s {url} -H 'Content-Type: application/json' -d '" in error(reply)["message"]


@pytest.mark.parametrize("content", ['{"message": "\\ud800"}', "[" * 100_000, '{"a":' * 100_000, "", '{"message": "a"} b'])
async def test_json_that_no_engine_could_be_sent_is_not_json_here(releases: Path, content: str) -> None:
    engine = ScriptedEngine()
    async with serving(engine, releases) as client:
        reply = await client.post("/chat", content=content, headers={"Content-Type": "application/json"})
    assert (reply.status_code, error(reply)["code"], engine.asked) == (400, "not_json", [])


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999"])
async def test_a_number_that_is_none_is_refused_by_its_name(releases: Path, number: str) -> None:
    content = f'{{"message": "a", "repeat_penalty": {number}}}'
    async with serving(ScriptedEngine(), releases) as client:
        reply = await client.post("/chat", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert "repeat_penalty" in error(reply)["message"]


async def test_a_client_that_hangs_up_within_its_body_is_no_mistake_of_the_server(releases: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await reader.read()
        await asyncio.sleep(0.1)
        assert (await client.post("/chat", json={"message": "Hi"})).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_body_that_is_too_large_is_not_read(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases, max_body_bytes=100) as client:
        reply = await client.post("/chat", json={"message": "x" * 200})
    assert reply.status_code == 413
    assert "100 bytes" in error(reply)["message"]


async def test_an_unknown_model_path_or_method_has_the_same_shape_of_error(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        replies = [
            await client.post("/chat", json={"message": "Hi", "model": "gpt-9"}),
            await client.get("/nothing"),
            await client.get("/chat"),
            await client.get("/chat/x"),
        ]
        named = await client.post("/chat", json={"message": "Hi", "model": MODEL})
    assert [reply.status_code for reply in replies] == [404, 404, 405, 404]
    assert "there is 'trinity'" in error(replies[0])["message"]
    assert all(error(reply)["code"] for reply in replies)
    assert named.status_code == 200


async def test_a_prompt_that_is_too_long_is_a_400_with_both_numbers_even_for_a_stream(releases: Path) -> None:
    async with serving(ScriptedEngine([PromptTooLong(5000, 4096)]), releases) as client:
        replies = [await client.post("/chat", json={"message": "Hi", "stream": stream}) for stream in (False, True)]
    for reply in replies:
        assert (reply.status_code, error(reply)["code"]) == (400, "context_length_exceeded")
        assert "5000" in error(reply)["message"] and "4096" in error(reply)["message"]


async def test_an_engine_that_breaks_off_is_a_502_and_in_a_stream_an_error_event_without_done(releases: Path) -> None:
    async with serving(ScriptedEngine([Delta("Hel"), EngineError("gone")]), releases) as client:
        whole = await client.post("/chat", json={"message": "Hi"})
        streams = [
            await client.post("/chat", json={"message": "Hi", "stream": True}),
            await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        ]
    assert (whole.status_code, whole.headers["retry-after"], error(whole)["message"]) == (502, "2", "gone")
    for reply in streams:
        last = sse(reply.text)[-1]
        assert reply.status_code == 200
        assert (last["error"]["code"], last["error"]["request_id"]) == ("engine_failed", reply.headers["x-request-id"])


async def test_an_engine_that_falls_silent_is_stopped(releases: Path) -> None:
    engine = ScriptedEngine([30.0, *ScriptedEngine().script])
    async with serving(engine, releases, first_token_timeout_s=0.1) as client:
        reply = await client.post("/chat", json={"message": "Hi"})
    assert (reply.status_code, error(reply)["code"]) == (504, "engine_stalled")
    assert (engine.running, engine.cancelled) == (0, 1)


async def test_a_bug_of_ours_in_mid_stream_is_an_error_event_and_is_logged_and_counted(
    releases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ScriptedEngine([Delta("Hel"), ZeroDivisionError("secret")]), releases) as client:
        streams = [
            await client.post("/chat", json={"message": "Hi", "stream": True}),
            await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        ]
        await asyncio.sleep(0.05)  # an answer is counted a little after its last byte
        counts = await client.get("/metrics")
    for reply in streams:
        last = sse(reply.text)[-1]
        assert (last["error"]["code"], last["error"]["request_id"]) == ("internal_error", reply.headers["x-request-id"])
        assert "secret" not in reply.text
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError] * 2
    assert 'trinity_answers_total{outcome="internal_error"} 2.0' in counts.text


async def test_a_bug_of_ours_keeps_the_shape_and_tells_the_client_nothing(releases: Path) -> None:
    async with serving(ScriptedEngine([ZeroDivisionError("secret")]), releases) as client:
        reply = await client.post("/chat", json={"message": "Hi"})
        again = await client.get("/healthz")
    assert (reply.status_code, error(reply)["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
    assert again.status_code == 200


async def test_a_stream_whose_first_token_takes_long_carries_pings_and_then_an_error_is_an_event(releases: Path) -> None:
    body = {"message": "Hi", "stream": True}
    engine = ScriptedEngine([0.35, *ScriptedEngine().script])
    async with serving(engine, releases, ping_s=0.1) as client:
        late = await client.post("/chat", json=body)
        engine.script = [0.3, EngineError("gone")]
        failed = await client.post("/chat", json=body)
        engine.script = [EngineError("gone")]
        at_once = await client.post("/chat", json=body)
    assert (late.status_code, late.text.startswith(": ping\n\n"), sse(late.text)[-1]) == (200, True, "[DONE]")
    assert (failed.status_code, sse(failed.text)[-1]["error"]["message"]) == (200, "gone")
    assert (at_once.status_code, error(at_once)["message"]) == (502, "gone")


async def test_a_stream_that_waits_for_a_slot_carries_pings_and_leaves_the_queue_with_its_client(releases: Path) -> None:
    engine = ScriptedEngine([Delta("a"), 0.5, Finish("stop", Usage(1, 1))])
    async with serving(engine, releases, ping_s=0.1, waiting=1) as client:
        first = asyncio.create_task(client.post("/chat", json={"message": "1"}))
        await until(lambda: engine.running == 1)
        async with client.stream("POST", "/chat", json={"message": "2", "stream": True}) as waiting:
            assert await anext(waiting.aiter_text()) == ": ping\n\n"
        await asyncio.sleep(0.1)
        third = await client.post("/chat", json={"message": "3"})
        assert (await first).status_code == third.status_code == 200
    assert [request.messages[0].content for request in engine.asked] == ["1", "3"]


async def test_an_idle_stream_carries_pings(releases: Path) -> None:
    async with serving(ScriptedEngine([Delta("a"), 0.25, Finish("stop", Usage(1, 1))]), releases, ping_s=0.1) as client:
        reply = await client.post("/chat", json={"message": "Hi", "stream": True})
    assert reply.text.count(": ping\n\n") == 2
    assert sse(reply.text)[-1] == "[DONE]"


async def test_beyond_slots_and_waiting_room_is_a_503_with_retry_after_and_the_others_are_answered(releases: Path) -> None:
    engine = ScriptedEngine([0.3, *ScriptedEngine().script], slots=2)
    async with serving(engine, releases, waiting=1) as client:
        replies = await asyncio.gather(*(client.post("/chat", json={"message": "Hi"}) for _ in range(5)))
        after = await client.post("/chat", json={"message": "Hi"})
    assert sorted(reply.status_code for reply in replies) == [200, 200, 200, 503, 503]
    refused = [reply for reply in replies if reply.status_code == 503]
    assert all(reply.headers["retry-after"] == "2" and error(reply)["code"] == "queue_full" for reply in refused)
    assert after.status_code == 200


async def test_a_wait_for_a_slot_has_an_end(releases: Path) -> None:
    engine = ScriptedEngine([0.5, *ScriptedEngine().script])
    async with serving(engine, releases, queue_timeout_s=0.1) as client:
        replies = await asyncio.gather(*(client.post("/chat", json={"message": "Hi"}) for _ in range(2)))
    assert sorted(reply.status_code for reply in replies) == [200, 504]
    late = next(reply for reply in replies if reply.status_code == 504)
    assert error(late)["code"] == "queue_timeout" and late.headers["retry-after"] == "5"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_answer_and_frees_the_slot(releases: Path, stream: bool) -> None:
    engine = ScriptedEngine([Delta("a"), 30.0, Finish("stop", Usage(1, 1))])
    async with serving(engine, releases) as client:
        request = asyncio.create_task(_read_some(client, {"message": "Hi", "stream": stream}))
        await until(lambda: engine.running == 1)
        await asyncio.sleep(0.1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: engine.running == 0)
        engine.script = ScriptedEngine().script
        assert (await client.post("/chat", json={"message": "Hi"})).status_code == 200
    assert engine.cancelled == 1


async def test_a_client_that_leaves_the_waiting_room_frees_its_place(releases: Path) -> None:
    engine = ScriptedEngine([0.5, *ScriptedEngine().script])
    async with serving(engine, releases, waiting=1) as client:
        first = asyncio.create_task(client.post("/chat", json={"message": "1"}))
        await until(lambda: engine.running == 1)
        second = asyncio.create_task(client.post("/chat", json={"message": "2"}))
        await asyncio.sleep(0.1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await asyncio.sleep(0.1)
        third = await client.post("/chat", json={"message": "3"})
        assert (await first).status_code == third.status_code == 200
    assert [request.messages[0].content for request in engine.asked] == ["1", "3"]


async def _read_some(client: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/chat", json=body) as reply:
        async for _ in reply.aiter_bytes():
            pass


async def test_models_lists_the_one_that_is_served_and_where_it_comes_from(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        listed = (await client.get("/v1/models")).json()
    (entry,) = listed["data"]
    provenance = entry.pop("trinity")
    assert entry == {"id": "trinity", "object": "model", "created": 1795564800, "owned_by": "trinity"}
    assert (provenance["release"], provenance["base"]["name"], provenance["adapter"]["rank"], provenance["num_ctx"]) == (
        "small-0123456789ab",
        "embedded:gemma-3-270m",
        64,
        4096,
    )
    assert (provenance["quantization"], provenance["engine"], provenance["device"]) == ("q4_k_m", "embedded", "")


async def test_a_request_id_of_the_client_is_kept_if_it_is_sane(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        ids = [(await client.get("/healthz", headers={"X-Request-ID": id})).headers["x-request-id"] for id in ("abc-1", "a b;c", "x" * 99)]
    assert ids[0] == "abc-1"
    assert ids[1] != "a b;c" and len(ids[2]) == 32


async def test_without_a_release_it_lives_says_what_to_run_and_serves_the_first_that_comes(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    async with serving(engine, tmp_path, wait=False) as client:
        await asyncio.sleep(0.1)
        alive, ready, chat, models = [
            await client.get("/healthz"),
            await client.get("/readyz"),
            await client.post("/chat", json={"message": "Hi"}),
            await client.get("/v1/models"),
        ]
        small_release(tmp_path)
        await until(lambda: bool(engine.loaded))
        served = await client.post("/chat", json={"message": "Hi"})
    assert alive.status_code == served.status_code == 200
    for reply in (ready, chat, models):
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert "make demo" in error(reply)["message"]


async def test_a_refused_release_is_not_served_and_the_next_one_is(tmp_path: Path) -> None:
    broken = small_release(tmp_path)
    (broken / "model.gguf").write_bytes(b"GGUF and nothing elsf")
    engine = ScriptedEngine()
    async with serving(engine, tmp_path, wait=False) as client:
        await asyncio.sleep(0.2)
        ready = await client.get("/readyz")
        small_release(tmp_path, "next-0123456789ab")
        await until(lambda: bool(engine.loaded))
        after = await client.get("/readyz")
    assert (ready.status_code, error(ready)["code"]) == (503, "release_refused")
    assert "was changed after its release" in error(ready)["message"]
    assert after.json()["model"] == "trinity:next-0123456789ab"


async def test_a_refused_release_that_is_mended_in_its_place_is_served(tmp_path: Path) -> None:
    gguf = small_release(tmp_path) / "model.gguf"
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[:5])
    engine = ScriptedEngine()
    async with serving(engine, tmp_path, wait=False) as client:
        await asyncio.sleep(0.2)
        torn = await client.get("/readyz")
        gguf.write_bytes(whole)
        await until(lambda: bool(engine.loaded))
        ready = await client.get("/readyz")
    assert (error(torn)["code"], ready.status_code) == ("release_refused", 200)


class RefusingWhileTheLinkMoves(ScriptedEngine):
    """Loading takes minutes with a large model, and a training may end meanwhile."""

    def __init__(self, releases: Path) -> None:
        super().__init__()
        self.releases = releases

    async def load(self, release: Release) -> str:
        if release.model == MODEL:
            small_release(self.releases, "next-0123456789ab")
            raise ReleaseError("probes not met")
        return await super().load(release)


async def test_a_release_that_comes_while_another_one_is_being_refused_is_not_refused_with_it(releases: Path) -> None:
    engine = RefusingWhileTheLinkMoves(releases)
    async with serving(engine, releases) as client:
        assert (await client.get("/readyz")).json()["model"] == "trinity:next-0123456789ab"


async def test_a_bug_in_bringing_up_a_release_is_said_and_logged(releases: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    engine.problem = ZeroDivisionError("secret")
    async with serving(engine, releases, wait=False) as client:
        await until(lambda: any(record.exc_info for record in caplog.records))
        reply = await client.get("/readyz")
    assert (reply.status_code, error(reply)["code"]) == (503, "not_ready")
    assert "its log knows more" in error(reply)["message"] and "secret" not in reply.text


async def test_readyz_follows_the_engine(releases: Path) -> None:
    engine = ScriptedEngine()
    async with serving(engine, releases) as client:
        well = await client.get("/readyz")
        engine.problem = EngineError("unplugged")
        await asyncio.sleep(LOOK_S)
        ill = await client.get("/readyz")
        engine.problem = None
    assert well.json() == {"status": "ready", "model": MODEL, "engine": "scripted"}
    assert (ill.status_code, error(ill)["message"]) == (503, "unplugged")


async def test_an_answer_holds_unicode_and_control_characters_whole(releases: Path) -> None:
    text = "a\u2028b\x85c\x00d\r\n\n e\U0001f468\u200d\U0001f680"
    async with serving(ScriptedEngine([Delta(text), Finish("stop", Usage(1, 1))]), releases) as client:
        reply = await client.post("/chat", json={"message": "Hi", "stream": True})
    assert sse(reply.text)[0]["delta"]["content"] == text
    assert json.loads(reply.text.split("data: ")[1])["delta"]["content"] == text
