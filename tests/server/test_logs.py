"""Lines of the log: one a request, with its id, and no word of a client in any of them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from server.auth import Keys
from server.chat import Delta, Finish, Usage
from server.limits import Limits
from server.logs import Formatter, JsonFormatter
from tests.server.scripted import ScriptedEngine, serving, small_release

PROMPT = "wherefore art thou"
HI = {"message": PROMPT}


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path)
    return tmp_path


@pytest.fixture
def said() -> Iterator[StringIO]:
    """What the server logs, as JSON lines."""
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(lambda record: not record.name.startswith("httpx"))  # the test's own client; configure() silences the server's
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.setLevel(before)
    root.removeHandler(handler)


def lines(said: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.getvalue().splitlines()]


def record(message: str, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "server.x", "levelname": logging.getLevelName(level), "msg": message, **extra})


@pytest.mark.anyio
async def test_a_request_is_one_line_with_its_id_and_what_was_learnt_of_it(releases: Path, said: StringIO) -> None:
    secret = Keys.open(releases / "state" / "keys.json").make("alice", Limits(9, 9))
    engine = ScriptedEngine([Delta("a"), 0.1, Finish("length", Usage(7, 11))])
    async with serving(engine, releases) as client:
        headers = {"Authorization": f"Bearer {secret}", "X-Request-ID": "mine-1"}
        await client.post("/chat", json={**HI, "stream": True}, headers=headers)
    [line] = [line for line in lines(said) if line.get("request_id") == "mine-1"]
    assert line["message"] == "POST /chat 200"
    kept = {name: line[name] for name in ("method", "path", "status", "caller", "outcome", "prompt_tokens", "completion_tokens")}
    assert kept == {
        "method": "POST",
        "path": "/chat",
        "status": 200,
        "caller": "alice",
        "outcome": "length",
        "prompt_tokens": 7,
        "completion_tokens": 11,
    }
    assert 0.1 <= line["seconds"] < 5 and 0 <= line["wait_s"] <= line["first_token_s"] < line["seconds"]


@pytest.mark.anyio
async def test_keys_and_prompts_are_in_no_line_wherever_a_client_puts_them(releases: Path, said: StringIO) -> None:
    secret = Keys.open(releases / "state" / "keys.json").make("alice", Limits(99, 9))
    places: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/chat", {"json": HI}),
        ("POST", "/chat", {"json": {"message": PROMPT, "temperature": PROMPT}}),
        ("POST", "/chat", {"content": json.dumps(HI)[:-1]}),
        ("POST", f"/chat?key={secret}&message={PROMPT}", {"json": HI}),
        ("POST", f"/chat/{secret}/{PROMPT}", {"json": HI}),
        ("GET", f"/{secret}", {}),
        ("GET", f"/v1/models?{PROMPT}", {}),
        ("POST", "/chat", {"json": {**HI, "model": PROMPT}, "headers": {"X-Request-ID": secret}}),
        ("POST", "/chat", {"json": HI, "headers": {"User-Agent": PROMPT, "Referer": PROMPT, "X-Forwarded-For": secret, "Cookie": secret}}),
        (secret.upper(), "/chat", {"json": HI}),
    ]
    bug = ScriptedEngine([ValueError(f"{PROMPT} {secret}")])
    for engine in (ScriptedEngine(), bug):
        async with serving(engine, releases) as client:
            for method, path, rest in places:
                for authorization in (f"Bearer {secret}", f"Bearer {secret}x", secret):
                    headers = {"Authorization": authorization, **rest.get("headers", {})}
                    await client.request(method, path, **{**rest, "headers": headers})
    text = said.getvalue()
    assert text.count('"message": "POST /chat 200"') >= 3 and '"trace"' in text, "else nothing was tried"
    assert not [line for line in text.splitlines() if secret.lower() in line.lower() or "wherefore" in line]


@pytest.mark.anyio
async def test_a_bug_s_line_carries_the_id_and_the_place_but_not_the_error_s_own_words(releases: Path, said: StringIO) -> None:
    async with serving(ScriptedEngine([ZeroDivisionError(PROMPT)]), releases) as client:
        await client.post("/chat", json=HI, headers={"X-Request-ID": "mine-2"})
    found = [line for line in lines(said) if line.get("request_id") == "mine-2" and "trace" in line]
    assert found and all("ZeroDivisionError" in line["trace"] and "scripted.py" in line["trace"] for line in found)


def test_outside_of_requests_an_error_keeps_its_words() -> None:
    try:
        int("disk full")
    except ValueError:
        text = Formatter().format(record("failed", logging.ERROR, exc_info=sys.exc_info()))
    assert text.startswith("ERROR: failed\n") and "ValueError: invalid literal" in text and "disk full" in text and "test_logs.py" in text


def test_a_line_of_text_says_each_fact_once() -> None:
    facts = {"request_id": "a", "method": "GET", "path": "/", "status": 200, "seconds": 0.5, "caller": ""}
    assert Formatter().format(record("GET / 200", facts=facts)) == "INFO: GET / 200 request_id=a seconds=0.5"


def test_a_line_of_json_is_one_line_whatever_it_holds() -> None:
    text = JsonFormatter().format(record("a\nb\x1b[0m\u2028"))
    assert "\n" not in text and "\x1b" not in text
    assert json.loads(text)["message"] == "a\nb\x1b[0m\u2028"
