"""The conversation in the terminal, over a real port."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from server import terminal
from server.auth import Keys
from server.chat import Delta
from server.errors import EngineError, SetupError
from server.limits import Limits
from tests.server.real import free_port
from tests.server.scripted import ScriptedEngine, serving, small_release

pytestmark = pytest.mark.anyio


async def test_turns_are_kept_and_a_key_is_made_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_release(tmp_path)
    keys = Keys.open(tmp_path / "state" / "keys.json")
    keys.make("first", Limits(60, 4))
    engine = ScriptedEngine()
    async with serving(engine, tmp_path) as client:
        flags = ["--port", str(client.base_url.port), "--state", str(tmp_path / "state")]
        assert await asyncio.to_thread(terminal.main, flags, io.StringIO("One\nTwo\n")) == 0
    assert capsys.readouterr().out == "> Hello ü\n> Hello ü\n> \n"
    assert [message.content for message in engine.asked[-1].messages] == ["One", "Hello ü", "Two"]
    assert keys.names == ["first"]


async def test_what_goes_wrong_is_the_servers_own_sentence(tmp_path: Path) -> None:
    small_release(tmp_path)
    engine = ScriptedEngine([Delta("Hel"), EngineError("the engine broke off")])
    async with serving(engine, tmp_path) as client:
        flags = ["--port", str(client.base_url.port), "--state", str(tmp_path / "state"), "--message", "Hi"]
        with pytest.raises(SetupError, match="broke off"):
            await asyncio.to_thread(terminal.main, flags)
        engine.script = [EngineError("it is gone")]
        with pytest.raises(SetupError, match="it is gone"):
            await asyncio.to_thread(terminal.main, flags)


def test_a_server_that_is_not_there_is_said_with_what_starts_one(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="make serve"):
        terminal.main(["--port", str(free_port()), "--state", str(tmp_path), "--message", "Hi"])
