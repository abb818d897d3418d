"""Releases come and go while clients keep asking, and not one request fails: bench.gateway's case release_switch, briefly."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import switching
from tests.server.real import OllamaProcess

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return switching.releases_of(tmp_path_factory.mktemp("gguf"), ("first", "second", "third"))


@pytest.mark.parametrize("engine", ["embedded", "ollama"])
def test_no_request_fails_while_two_releases_come_and_one_goes_back(
    engine: str, releases: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    flags = ["--engine", engine, "--state", str(tmp_path / "state"), "--releases", str(releases[0].parent), "--threads", "1"]
    if engine == "ollama":
        process: OllamaProcess = request.getfixturevalue("ollama_process")
        flags += ["--ollama-url", process.url]
    measured = switching.measure(releases, flags, clients=3, seconds=8)
    assert (measured["failed_requests"], measured["problems"]) == (0, {})
    assert measured["model_at_the_end"] == f"trinity:{releases[1].name}"
    assert set(measured["answers"]) == {f"trinity:{directory.name}" for directory in releases}
