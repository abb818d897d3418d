"""What is special about a real Ollama: its names, its silent ways to fail, its death. What it shares with the embedded
engine is asked of both in tests/server/engines/test_conformance.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from server import conversation
from server.chat import ChatRequest, Delta, Message, Wishes
from server.engines.ollama import OllamaEngine
from server.errors import EngineError, ReleaseError, SetupError
from server.manifest import Release, read
from tests.server.real import OllamaProcess, ollama, probe, write_release

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]


@pytest.fixture
async def engine(ollama_process: OllamaProcess) -> AsyncIterator[OllamaEngine]:
    made = OllamaEngine(ollama_process.url, slots=1)
    yield made
    await made.close()


def tags(process: OllamaProcess) -> dict[str, str]:
    listed = httpx2.get(f"{process.url}/api/tags", trust_env=False).json()["models"]
    return {item["name"]: item["digest"] for item in listed}


def long_request(release: Release) -> ChatRequest:
    request = conversation.request([Message("user", "Hi")], Wishes(temperature=0.0), release.manifest.prompt)
    return replace(request, max_tokens=230, stop=())


async def test_latest_moves_only_once_the_probes_are_met(engine: OllamaEngine, ollama_process: OllamaProcess, release: Release) -> None:
    digest = await engine.load(release)
    before = tags(ollama_process)
    assert before[release.model] == before["trinity:latest"] == digest
    manifest = release.manifest.model_copy(update={"release": "wrong-0123456789ab"})
    other = manifest.model_copy(update={"prompt": manifest.prompt.model_copy(update={"template": manifest.prompt.template + "\n"})})
    with pytest.raises(ReleaseError, match="renders another prompt"):
        await engine.load(replace(release, manifest=other))
    assert tags(ollama_process)["trinity:latest"] == digest


async def test_what_ollama_bakes_in_is_the_release_s_own(engine: OllamaEngine, ollama_process: OllamaProcess, release: Release) -> None:
    await engine.load(release)
    shown = httpx2.post(f"{ollama_process.url}/api/show", json={"model": release.model}, trust_env=False).json()
    assert shown["template"] == release.manifest.prompt.template
    parameters = dict(line.split(maxsplit=1) for line in shown["parameters"].splitlines())
    assert (parameters["num_ctx"], parameters["top_k"]) == ("256", "64")


async def test_a_broken_gguf_which_ollama_answers_with_200_is_an_error(engine: OllamaEngine, tmp_path: Path) -> None:
    directory = tmp_path / "broken-0123456789ab"
    directory.mkdir()
    (directory / "model.gguf").write_bytes(b"GGUF" + os.urandom(200))
    broken = read(write_release(directory, [probe([Message("user", "Hi")], [2], "")]))
    with pytest.raises(EngineError, match="did not take"):
        await engine.load(broken)


async def test_a_model_removed_behind_the_gateway_s_back_is_not_ready(
    engine: OllamaEngine, ollama_process: OllamaProcess, release: Release
) -> None:
    await engine.load(release)
    httpx2.request("DELETE", f"{ollama_process.url}/api/delete", json={"model": release.model}, trust_env=False)
    status = await engine.status(release.model)
    assert not status.ready and "no longer has" in status.detail
    await engine.load(release)
    assert (await engine.status(release.model)).ready


async def test_an_ollama_killed_in_mid_answer_is_an_error_and_never_a_short_answer(tmp_path: Path, release: Release) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with ollama(tmp_path / how.name) as process:
            engine = OllamaEngine(process.url, slots=1)
            await engine.load(release)
            stream = engine.chat(release.model, long_request(release))
            assert isinstance(await anext(stream), Delta)
            process.process.send_signal(how)
            with pytest.raises(EngineError):
                async for _ in stream:
                    pass
            process.process.wait(timeout=30)
            assert not (await engine.status(release.model)).ready
            with pytest.raises(SetupError, match="no Ollama answers"):
                await engine.check()
            await engine.close()


async def test_a_llama_server_that_is_killed_costs_one_answer(
    engine: OllamaEngine, ollama_process: OllamaProcess, release: Release
) -> None:
    await engine.load(release)
    stream = engine.chat(release.model, long_request(release))
    assert isinstance(await anext(stream), Delta)
    runners = ollama_process.runners()
    assert runners
    for pid in runners:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError):
        async for _ in stream:
            pass
    request = replace(long_request(release), max_tokens=2)
    assert [event async for event in engine.chat(release.model, request)]
