"""requirements/pin.py against servers of ours that speak a registry's and the hub's protocols, on a copy of what it writes to."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.local_site import serving

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = b'{"schemaVersion": 2}'
HEADED = "sha256:" + hashlib.sha256(b"an index").hexdigest()
HASHED = "sha256:" + hashlib.sha256(MANIFEST).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DOCKERFILE = """ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04
FROM ${BASE_IMAGE} AS packages
FROM python:3.13-slim-bookworm
ARG LOCK=trainer
"""
COMPOSE = """services:
  ollama:
    image: ${OLLAMA_IMAGE:-ollama/ollama:0.34.4}
    ports: ["${TRINITY_ADDRESS:-127.0.0.1}:${TRINITY_PORT:-8080}:8080"]
    mem_limit: ${BYTES:-12000000000}
  gateway:
    image: ${TRINITY_SERVER_IMAGE:-trinity-server}
"""
PRESET = """[model]
name = "unsloth/gemma-3-12b-it"   # why
backend = "unsloth"

[export]
name = "trinity"
"""


class Registry(BaseHTTPRequestHandler):
    """/v2 wants an anonymous token for the repository asked about; /api is the hub. `quirks` of the server say what else is wrong."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, quirks = urlsplit(self.path).path, self.server.quirks  # type: ignore[attr-defined]
        if path == "/token":
            return self.reply(200, {"token": f"for {parse_qs(urlsplit(self.path).query)['scope'][0]}"})
        if path == "/api/models/unsloth/gemma-3-12b-it/revision/main":
            return self.reply(200, {"sha": quirks.get("commit", COMMIT)})
        repository = path.removeprefix("/v2/").split("/manifests/")[0]
        if not path.startswith("/v2/") or path in quirks.get("absent", ()):
            return self.reply(404, {})
        if self.headers.get("Authorization") != f"Bearer for repository:{repository}:pull":
            place = f"http://127.0.0.1:{self.server.server_port}/token"  # type: ignore[attr-defined]
            challenge = f'Bearer realm="{place}",service="a registry",scope="repository:{repository}:pull"'
            return self.reply(401, {}, {"WWW-Authenticate": quirks.get("challenge", challenge)})
        if "index" not in self.headers["Accept"]:
            return self.reply(406, {})
        said = {} if repository == "library/python" else {"Docker-Content-Digest": quirks.get("digest", HEADED)}
        return self.reply(200, MANIFEST, said)

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


class Checkout:
    def __init__(self, root: Path, server: http.server.HTTPServer) -> None:
        self.root, self._url = root, f"http://127.0.0.1:{server.server_port}"
        self.quirks: dict[str, Any] = server.quirks  # type: ignore[attr-defined]
        for name, text in {
            "docker/x.Dockerfile": DOCKERFILE,
            "compose.yaml": COMPOSE,
            "docker/.env.example": "#OLLAMA_IMAGE=ollama/ollama:0.34.4\n",
            "trainer/presets/p.toml": PRESET,
        }.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    def pin(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        places = ["--root", str(self.root), "--registry", self._url, "--hub", self._url]
        command = [sys.executable, str(ROOT / "requirements" / "pin.py"), *places, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def read(self, name: str) -> str:
        return (self.root / name).read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    with serving(Registry) as server:
        server.quirks = {}  # type: ignore[attr-defined]
        yield Checkout(tmp_path, server)


def test_what_has_no_pin_is_named_without_asking_anybody(checkout: Checkout) -> None:
    done = checkout.pin("--missing", "--registry", "http://127.0.0.1:1", "--hub", "http://127.0.0.1:1")
    names = ["nvidia/cuda:13.0.3-base-ubuntu24.04", "ollama/ollama:0.34.4", "python:3.13-slim-bookworm", "unsloth/gemma-3-12b-it"]
    assert (done.returncode, done.stdout.split()) == (0, names)


def test_a_pin_stands_beside_every_name_and_nothing_else_changes(checkout: Checkout) -> None:
    done = checkout.pin()
    assert done.returncode == 0, done.stderr
    assert checkout.read("docker/x.Dockerfile") == DOCKERFILE.replace("ubuntu24.04", f"ubuntu24.04@{HEADED}").replace(
        "bookworm", f"bookworm@{HASHED}"
    ), "a registry that says no digest: the manifest's own hash"
    assert checkout.read("compose.yaml") == COMPOSE.replace("ollama:0.34.4", f"ollama:0.34.4@{HEADED}")
    assert checkout.read("docker/.env.example") == f"#OLLAMA_IMAGE=ollama/ollama:0.34.4@{HEADED}\n"
    preset = tomllib.loads(checkout.read("trainer/presets/p.toml"))
    assert preset == {
        "model": {"name": "unsloth/gemma-3-12b-it", "revision": COMMIT, "backend": "unsloth"},
        "export": {"name": "trinity"},
    }
    assert checkout.pin("--missing").stdout.strip() == ""


def test_a_second_run_takes_what_the_tag_is_by_then(checkout: Checkout) -> None:
    assert checkout.pin().returncode == 0
    before = checkout.read("compose.yaml")
    assert "wrote" not in checkout.pin().stdout
    checkout.quirks |= {"digest": HASHED, "commit": "f" * 40}
    assert checkout.pin().returncode == 0
    assert checkout.read("compose.yaml") == before.replace(HEADED, HASHED)
    assert tomllib.loads(checkout.read("trainer/presets/p.toml"))["model"]["revision"] == "f" * 40


@pytest.mark.parametrize(
    ("quirks", "why"),
    [
        ({"absent": ["/v2/ollama/ollama/manifests/0.34.4"]}, "answers 404"),
        ({"digest": "sha256:latest"}, "which is no digest"),
        ({"challenge": 'Basic realm="mine"'}, "wants a login"),
        ({"commit": "main"}, "which is no commit"),
    ],
)
def test_an_answer_that_is_no_pin_is_not_written(checkout: Checkout, quirks: dict[str, Any], why: str) -> None:
    checkout.quirks |= quirks
    done = checkout.pin()
    assert done.returncode == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    named = {line.split()[1] for line in done.stderr.splitlines()}
    assert set(checkout.pin("--missing").stdout.split()) == named, "what could be had is written all the same"


def test_where_nobody_can_be_reached_nothing_is_written(checkout: Checkout) -> None:
    done = checkout.pin("--registry", "http://127.0.0.1:1", "--hub", "http://127.0.0.1:1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 4
    assert done.stderr.count("cannot be reached") == 4
    assert checkout.read("compose.yaml") == COMPOSE
    assert checkout.read("trainer/presets/p.toml") == PRESET


def test_every_image_and_model_of_this_repository_is_seen(checkout: Checkout) -> None:
    for name in ("docker", "trainer/presets"):
        shutil.rmtree(checkout.root / name)
        shutil.copytree(ROOT / name, checkout.root / name)
    shutil.copy(ROOT / "compose.yaml", checkout.root)
    done = checkout.pin()
    names = {line.split()[1].split(":")[0] for line in done.stdout.splitlines() if " wrote " not in line}
    assert names == {"nvidia/cuda", "python", "ollama/ollama", "unsloth/gemma-3-12b-it"}, done.stderr
    assert checkout.pin("--missing").stdout.strip() == ""
