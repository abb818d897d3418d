"""/openapi.json and /docs: whole, true to the routes, and loading nothing. Whether replies keep to it is schemathesis' part."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server import docs
from server.app import create_app
from server.schemas import ChatEvent, CompletionChunk
from server.settings import Settings
from tests.server.scripted import ScriptedEngine, serving, small_release, sse

pytestmark = pytest.mark.anyio
UNDESCRIBED = {"/", "/docs", "/openapi.json", "/metrics"}
"""Pages, and what Prometheus reads by a format of its own."""


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return create_app(Settings(releases=tmp_path, state=tmp_path / "state"), ScriptedEngine())


@pytest.fixture
def tree(app: FastAPI) -> dict[str, Any]:
    return docs.document(app)


def test_every_path_is_described(app: FastAPI, tree: dict[str, Any]) -> None:
    included: list[Any] = list(app.routes)  # FastAPI's own type for them is not public
    assert set(tree["paths"]) | UNDESCRIBED == {route.path for router in included for route in router.original_router.routes}
    assert all(operation["description"] for methods in tree["paths"].values() for operation in methods.values())


def test_every_reference_leads_somewhere_and_every_schema_is_used(tree: dict[str, Any]) -> None:
    used = set(re.findall(r"'#/components/schemas/(\w+)'", str(tree)))
    assert used == set(tree["components"]["schemas"])


def test_what_is_refused_is_said_in_the_schema(tree: dict[str, Any]) -> None:
    fields = tree["components"]["schemas"]["CompletionBody"]["properties"]
    assert fields["tools"]["enum"] == [None, []]
    assert fields["n"]["enum"] == [None, 1]
    assert tree["components"]["schemas"]["ChatBody"]["additionalProperties"] is False


def test_every_error_that_a_client_may_see_is_listed_with_its_code(tree: dict[str, Any]) -> None:
    listed = {status: reply["description"] for status, reply in tree["paths"]["/chat"]["post"]["responses"].items()}
    assert "context_length_exceeded" in listed["400"] and "queue_full" in listed["503"] and "499" not in listed
    assert "Retry-After" in tree["paths"]["/chat"]["post"]["responses"]["429"]["headers"]


async def test_the_page_shows_every_path_and_field_and_loads_nothing(tmp_path: Path) -> None:
    small_release(tmp_path)
    async with serving(ScriptedEngine(), tmp_path) as client:
        reply = await client.get("/docs")
        tree = (await client.get("/openapi.json")).json()
    assert all(f"POST {path}" in reply.text or f"GET {path}" in reply.text for path in tree["paths"])
    fields = [name for kind in ("ChatBody", "CompletionBody") for name in tree["components"]["schemas"][kind]["properties"]]
    assert all(f"<td>{name}</td>" in reply.text for name in fields)
    assert not re.findall(r"<script|<link|<img|<iframe|\bsrc=|@import|url\(|https?://", reply.text)


async def test_the_events_of_a_stream_are_as_described(tmp_path: Path) -> None:
    small_release(tmp_path)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with serving(ScriptedEngine(), tmp_path) as client:
        *events, _ = sse((await client.post("/chat", json=body)).text)
        *chunks, _ = sse((await client.post("/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}})).text)
    assert [ChatEvent.model_validate(event).finish_reason for event in events] == [None, None, "stop"]
    assert [len(CompletionChunk.model_validate(chunk).choices) for chunk in chunks] == [1, 1, 1, 1, 0]


async def test_the_page_s_policy_lets_in_its_own_style_and_nothing_else(tmp_path: Path) -> None:
    async with serving(ScriptedEngine(), tmp_path, wait=False) as client:
        reply = await client.get("/docs")
    style = re.findall(r"<style>(.*?)</style>", reply.text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and f"style-src 'sha256-{digest}'" in policy and "script" not in policy


def test_whatever_stands_in_the_document_is_shown_as_text(tree: dict[str, Any]) -> None:
    tree["info"]["description"] = "<script>alert(1)</script>"
    tree["paths"]["/chat"]["post"]["description"] = '"><img src=x>'
    shown = docs.page(tree)
    assert "<script" not in shown and "<img" not in shown and "&lt;script&gt;" in shown
