from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.manifest import Release, find, read
from tests.server.real import ROOT, GatewayProcess, OllamaProcess, absent, base_release, gateway, llama_server, ollama


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def demo_release() -> Release:
    """The release that a demo or a training left: TRINITY_RELEASE, else output/gguf/current. TRINITY_E2E=require makes its absence a failure."""
    directory = find(Path(os.environ.get("TRINITY_RELEASE") or ROOT / "output" / "gguf"))
    if directory is None:
        absent("no release: run `make demo` first, or name one in TRINITY_RELEASE")
    return read(directory)


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release of the untrained 270M model; read only."""
    return base_release(tmp_path_factory.mktemp("gguf") / "base-0123456789ab")


@pytest.fixture(scope="session")
def ollama_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaProcess]:
    with ollama(tmp_path_factory.mktemp("ollama")) as process:
        yield process


@pytest.fixture(scope="module", params=["embedded", "ollama", "openai"])
def each_engine(
    request: pytest.FixtureRequest, demo_release: Release, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A gateway that serves the demo's release: by llama.cpp in its child, by a real Ollama, by a real llama-server."""
    state = tmp_path_factory.mktemp("state")
    flags = ["--releases", str(demo_release.directory), "--state", str(state), "--engine", request.param]
    with ExitStack() as closing:
        if request.param == "ollama":
            process: OllamaProcess = request.getfixturevalue("ollama_process")
            flags += ["--ollama-url", process.url]
        if request.param == "openai":
            flags += ["--openai-url", closing.enter_context(llama_server(demo_release))]
        running = closing.enter_context(gateway(*flags))
        running.wait_ready(600)
        yield running
