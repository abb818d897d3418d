"""What docker/ and compose.yaml promise that can be read without a Docker engine; tests/e2e/test_compose.py runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = (ROOT / "compose.yaml").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "docker" / ".env.example").read_text(encoding="utf-8")
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_builds_without_buildkit_too(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("BASE_IMAGE=") == 1, "the base can be replaced"
    assert not re.search(r"--mount|--link|--chmod|<<|^# syntax", text, flags=re.MULTILINE)


def test_every_variable_of_the_compose_file_is_explained_with_its_default() -> None:
    wanted = set(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE))
    assert len(wanted) > 8
    assert dict(re.findall(r"^#(\w+)=(.*)$", EXAMPLE, flags=re.MULTILINE)) == dict(wanted)
    assert len(dict(wanted)) == len(wanted), "one default a variable"


def test_only_the_gateway_publishes_a_port_and_on_the_loopback() -> None:
    assert re.findall(r"ports:.*", COMPOSE) == ['ports: ["${TRINITY_ADDRESS:-127.0.0.1}:${TRINITY_PORT:-8080}:${TRINITY_PORT:-8080}"]']


def test_every_setting_of_the_gateway_can_stand_in_env() -> None:
    """But for where things lie in the container, and for engines that do not run there."""
    elsewhere = {"config", "releases", "state", "keys", "ollama_models", "engine_models", "threads", "start_timeout_s"}
    elsewhere |= {name for name in Settings.model_fields if name.startswith("openai_")}
    named = {name.lower() for name in re.findall(r"^ +TRINITY_(\w+):", COMPOSE, flags=re.MULTILINE)}
    assert named == set(Settings.model_fields) - elsewhere
