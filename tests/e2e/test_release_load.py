"""The loader against a real Ollama: what it leaves there, what it takes away, and what a SIGKILL leaves."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from bench import switching
from server import manifest
from server.release.state import State
from tests.server.real import ROOT, OllamaProcess, clean_environment, ollama, write_release

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return switching.releases_of(tmp_path_factory.mktemp("gguf"), ("first", "second", "third"))


class Loading:
    def __init__(self, process: OllamaProcess, state: Path) -> None:
        self.process, self.state = process, State(state)

    def start(self, *words: str) -> subprocess.Popen[str]:
        flags = ["--engine", "ollama", "--ollama-url", self.process.url, "--state", str(self.state.directory)]
        command = [sys.executable, "-m", "server", "release", *words, *flags]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=clean_environment())

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        said = process.communicate(timeout=300)
        assert "Traceback" not in said[1], said[1]
        return process.returncode, "".join(said)

    def wanted(self) -> tuple[str, str]:
        wanted = self.state.read()
        assert wanted
        return wanted.live.manifest.release, wanted.previous.manifest.release if wanted.previous else ""

    def tags(self) -> dict[str, str]:
        listed = httpx2.get(f"{self.process.url}/api/tags", trust_env=False).json()["models"]
        return {item["name"].removeprefix("trinity:"): item["digest"] for item in listed}


@pytest.fixture
def loading(ollama_process: OllamaProcess, tmp_path: Path) -> Loading:
    return Loading(ollama_process, tmp_path / "state")


def test_ollama_keeps_what_is_wanted_the_one_before_and_what_is_not_ours(loading: Loading, releases: list[Path]) -> None:
    first, second, third = (directory.name for directory in releases)
    assert loading.run("load", str(releases[0]))[0] == 0
    body = {"source": f"trinity:{first}", "destination": "trinity:mine"}
    assert httpx2.post(f"{loading.process.url}/api/copy", json=body, trust_env=False).status_code == 200
    assert loading.run("load", str(releases[1]))[0] == 0
    code, said = loading.run("load", str(releases[2]))
    assert code == 0 and f"deleted trinity:{first}" in said
    tags = loading.tags()
    assert {second, third, "latest", "mine"} <= set(tags) and first not in tags
    assert tags["latest"] == tags[third]
    assert "is loaded already" in loading.run("load", str(releases[2]))[1]
    assert loading.wanted() == (third, second)
    code, said = loading.run("status")
    assert f"wanted    trinity:{third}" in said and "engine    Ollama" in said


def test_a_rollback_needs_no_files(loading: Loading, releases: list[Path], tmp_path: Path) -> None:
    moved = shutil.copytree(releases[0], tmp_path / releases[0].name)
    for directory in (moved, releases[1]):
        assert loading.run("load", str(directory))[0] == 0
    shutil.rmtree(moved)
    assert loading.run("rollback")[0] == 0
    assert loading.wanted() == (releases[0].name, releases[1].name)
    assert loading.tags()["latest"] == loading.tags()[releases[0].name]


def test_a_kill_of_the_loader_leaves_the_old_or_the_new_and_the_next_load_finishes(releases: list[Path], tmp_path: Path) -> None:
    with ollama(tmp_path / "ollama") as process:
        loading = Loading(process, tmp_path / "state")
        assert loading.run("load", str(releases[0]))[0] == 0
        before, whole_s = loading.state.path.read_bytes(), 6.0
        for trial in range(4):
            began = time.monotonic()
            running = loading.start("load", str(releases[1]))
            time.sleep(whole_s * (trial + 0.9) / 4)
            running.kill()
            running.communicate()
            assert loading.wanted()[0] in {releases[0].name, releases[1].name}
            assert httpx2.get(f"{process.url}/api/tags", trust_env=False).status_code == 200
            if loading.wanted()[0] == releases[1].name:
                whole_s = time.monotonic() - began
                loading.state.path.write_bytes(before)
        assert loading.run("load", str(releases[1]))[0] == 0
        assert loading.wanted() == (releases[1].name, releases[0].name)
        assert not loading.state.loading()


def test_a_gguf_that_only_the_engine_can_see_is_broken_changes_nothing(loading: Loading, releases: list[Path], tmp_path: Path) -> None:
    assert loading.run("load", str(releases[0]))[0] == 0
    before = loading.state.path.read_bytes()
    broken = shutil.copytree(releases[0], tmp_path / "broken-0123456789ab")
    content = (broken / "model.gguf").read_bytes()
    (broken / "model.gguf").write_bytes(content[: len(content) // 2])
    probes = [item.model_dump() for item in manifest.read(releases[0]).probes]
    code, said = loading.run("load", str(write_release(broken, probes, stop=["<end_of_turn>", "\n"])))
    assert code == 2 and said.strip().splitlines()[-1].startswith("release: ")
    assert loading.state.path.read_bytes() == before
    tags = loading.tags()
    assert tags["latest"] == tags[releases[0].name]
