"""The bench that claims no failed requests must see a failed one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench import switching
from server.chat import Delta
from server.errors import EngineError
from tests.server.scripted import HELLO, ScriptedEngine, serving, small_release

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def asked(tmp_path: Path, engine: ScriptedEngine, number: int) -> list[switching.Asked]:
    small_release(tmp_path)
    async with serving(engine, tmp_path) as client:
        return await once(str(client.base_url), number)


async def once(url: str, number: int) -> list[switching.Asked]:
    asked: list[switching.Asked] = []
    enough = asyncio.Event()
    enough.set()
    await switching._client(url, number, asked, enough)
    return asked


@pytest.mark.parametrize("number", [0, 1])
async def test_a_whole_answer_is_one_in_a_stream_and_alone(tmp_path: Path, number: int) -> None:
    [one] = await asked(tmp_path, ScriptedEngine(HELLO), number)
    assert (one.model, one.problem) == ("trinity:small-0123456789ab", "")
    assert switching.summary([one])["failed_requests"] == 0


@pytest.mark.parametrize(("number", "problem"), [(0, "a stream that ends in"), (1, "502 gone")])
async def test_an_answer_that_breaks_off_is_a_failed_request(tmp_path: Path, number: int, problem: str) -> None:
    [one] = await asked(tmp_path, ScriptedEngine([Delta("Hel"), EngineError("gone")]), number)
    assert one.problem.startswith(problem)
    assert switching.summary([one])["failed_requests"] == 1


async def test_a_refusal_and_a_server_that_is_not_there_are_failed_requests(tmp_path: Path) -> None:
    [refused] = await asked(tmp_path, ScriptedEngine([EngineError("gone")]), 0)
    [gone] = await once("http://127.0.0.1:9", 1)
    found = switching.summary([refused, gone])
    assert (found["requests"], found["failed_requests"]) == (2, 2)
    assert found["problems"] == {"502 gone": 1, "ConnectError": 1}
