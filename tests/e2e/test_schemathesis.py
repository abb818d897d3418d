"""Schemathesis asks everything that /openapi.json promises, and whatever nobody promised, of a real server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from server.chat import ChatRequest, Delta, Event, Finish, Usage
from tests.server.scripted import HELLO, ScriptedEngine, serving, small_release

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]
# A schema cannot say that turns alternate, nor that a model's name is ours: what it allows may still be refused.
LEFT_OUT = "positive_data_acceptance"


class Cut(ScriptedEngine):
    """What no script can do is to meet any schema; an answer that was cut need not."""

    async def chat(self, model: str, request: ChatRequest) -> AsyncGenerator[Event]:
        self.script = [Delta("{"), Finish("length", Usage(5, 1))] if request.schema is not None else HELLO
        async for event in super().chat(model, request):
            yield event


async def schemathesis(where: str, url: str, num_examples: int) -> tuple[int, str]:
    """Exit code and output."""
    flags = ["--url", url, "--exclude-checks", LEFT_OUT, "--max-examples", str(num_examples), "--seed", "1", "--no-color"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", where, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_every_reply_is_one_that_the_document_promises(tmp_path: Path) -> None:
    small_release(tmp_path / "gguf")
    engine = Cut()
    async with serving(engine, tmp_path / "gguf", slots=4) as client:
        url = str(client.base_url).rstrip("/")
        code, output = await schemathesis(f"{url}/openapi.json", url, 40)
    assert code == 0, output
    assert len(engine.asked) > 20, "hardly anything got through: the test asks too little"


def no_bad_request(tree: dict[str, Any]) -> None:
    del tree["paths"]["/chat"]["post"]["responses"]["400"]


def another_reply(tree: dict[str, Any]) -> None:
    tree["components"]["schemas"]["Ready"]["required"].append("colour")


@pytest.mark.parametrize("lie", [no_bad_request, another_reply])
async def test_a_document_that_promises_something_else_is_caught(tmp_path: Path, lie: Any) -> None:
    small_release(tmp_path / "gguf")
    async with serving(ScriptedEngine(), tmp_path / "gguf", slots=4) as client:
        tree = (await client.get("/openapi.json")).json()
        lie(tree)
        (tmp_path / "openapi.json").write_text(json.dumps(tree), encoding="utf-8")
        code, output = await schemathesis(str(tmp_path / "openapi.json"), str(client.base_url).rstrip("/"), 10)
    assert code == 1, output
