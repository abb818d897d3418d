"""What Open WebUI 0.12 sends to a connection of type OpenAI, replayed: written down from its routers/openai.py, routers/tasks.py
and utils/payload.py. docs/open-webui.md says how to connect it, and which of its switches keeps tools out of its requests.
"""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from server.manifest import Release
from tests.server.real import GatewayProcess
from tests.server.scripted import sse

pytestmark = pytest.mark.e2e
HEADERS = {
    "Content-Type": "application/json",
    "Authorization": "Bearer none-needed",
    "User-Agent": "Python/3.11 aiohttp/3.13.2",
    "X-OpenWebUI-User-Name": "Ada%20L.",
    "X-OpenWebUI-User-Id": "5f0c",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "admin",
}
TITLE = """### Task:
Generate a concise title summarizing the chat history.
### Output:
JSON format: { "title": "your concise title here" }
### Chat History:
<chat_history>
USER: every day at noon
ASSISTANT: 0 12 * * *
</chat_history>"""


@pytest.fixture
def post(each_engine: GatewayProcess) -> Any:
    def send(**body: Any) -> httpx2.Response:
        return each_engine.http.post("/v1/chat/completions", headers=HEADERS, json={"model": "trinity", **body})

    return send


def test_the_connection_is_verified_and_the_models_are_listed(each_engine: GatewayProcess) -> None:
    reply = each_engine.http.get("/v1/models", headers=HEADERS)
    assert reply.status_code == 200
    assert [(model["id"], model["owned_by"]) for model in reply.json()["data"]] == [("trinity", "trinity")]


def test_a_chat_with_system_prompt_and_every_slider_it_has(post: Any, demo_release: Release) -> None:
    reply = post(
        stream=True,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": demo_release.probes[0].messages[-1].content},
        ],
        stream_options={"include_usage": True},
        temperature=0.8,
        top_p=0.9,
        min_p=0.05,
        max_tokens=128,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        seed=42,
        stop=["\n\n"],
        logit_bias={},
    )
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = sse(reply.text)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert (usage["choices"], done) == ([], "[DONE]") and usage["usage"]["completion_tokens"] > 0


def test_a_second_turn_after_an_answer_that_was_stopped_at_once(post: Any) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "every day at noon"}]},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "every day at one"},
    ]
    assert post(stream=True, messages=turns, max_tokens=16).status_code == 200


def test_its_background_tasks_title_tags_and_follow_ups(post: Any) -> None:
    reply = post(stream=False, messages=[{"role": "user", "content": TITLE}], max_tokens=64)
    assert reply.status_code == 200 and isinstance(reply.json()["choices"][0]["message"]["content"], str)
    newer = post(stream=False, messages=[{"role": "user", "content": TITLE}], max_completion_tokens=64)
    assert newer.status_code == 200


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "search_web", "parameters": {"type": "object"}}}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "text only"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "must end with a user message"),
    ],
    ids=["native function calling", "an image", "continue response"],
)
def test_what_this_model_has_not_is_said_in_words_that_it_shows(post: Any, extra: dict[str, Any], words: str) -> None:
    reply = post(**{"stream": True, "messages": [{"role": "user", "content": "Hi"}], **extra})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
