from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.manifest import Release
from tests.server.real import OllamaProcess, base_release, ollama


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A true release of the untrained 270M model; read only."""
    return base_release(tmp_path_factory.mktemp("gguf") / "base-0123456789ab")


@pytest.fixture(scope="session")
def ollama_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaProcess]:
    with ollama(tmp_path_factory.mktemp("ollama")) as process:
        yield process
