"""The doctor beside a real Docker engine and a real Ollama."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.real import ROOT, OllamaProcess, absent, ollama_binary
from trainer import cards, diagnosis, doctor

pytestmark = pytest.mark.e2e


def lines(**environment: str) -> dict[str, dict[str, str]]:
    command = [sys.executable, "-m", "trainer", "doctor", "--json", "--preset", "tiny"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return {line["name"]: line for line in json.loads(done.stdout)["lines"]}


def test_an_engine_and_a_compose_that_are_there_are_well_and_absent_ones_named() -> None:
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        absent("no Docker engine answers: start one, or name it in DOCKER_HOST")
    there = lines()
    assert (there["docker"]["status"], there["compose"]["status"]) == ("ok", "ok"), there
    gone = lines(DOCKER_HOST="unix:///nowhere.sock", COMPOSE="no-such-compose")
    assert "the daemon does not run" in gone["docker"]["found"]
    assert "systemctl" in gone["docker"]["remedy"]
    assert gone["compose"]["found"] == "not installed"


@pytest.mark.skipif(cards.count() > 0, reason="Docker gives containers the card here")
def test_what_docker_says_of_a_card_that_it_cannot_give_is_understood() -> None:
    images = doctor.ask(("docker", "image", "ls", "--quiet"))
    if images.code != 0 or not images.out:
        absent("no Docker engine with an image")
    trial = doctor.ask(("docker", "run", "--rm", "--network", "none", "--gpus", "all", "--entrypoint", "true", images.out.split()[0]))
    assert trial.code != 0
    line = diagnosis.refused(trial, "580.95.05")
    assert "nvidia-container-toolkit" in line.remedy, trial


def test_an_ollama_is_found_with_its_version_running_or_not(tmp_path: Path) -> None:
    binary = ollama_binary() or absent("no Ollama: name one in TRINITY_OLLAMA")
    path = f"{Path(binary).parent}:{os.environ['PATH']}"
    assert lines(PATH=path, OLLAMA_HOST="127.0.0.1:9")["ollama"]["found"].endswith("not running")
    running = OllamaProcess(binary, tmp_path)
    try:
        there = lines(PATH=path, OLLAMA_HOST=running.url)
    finally:
        running.stop()
    assert there["ollama"]["status"] == "ok"
    assert there["ollama"]["found"].endswith(", running")
    assert there[f"port {running.url.rpartition(':')[2]}"]["found"] == "Ollama answers there"
