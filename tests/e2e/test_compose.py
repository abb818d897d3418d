"""The containers of compose.yaml on a real Docker engine with a real Ollama, from `make up` without a release to a restarted engine.

The tests of this file go on from one another, in their order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator

import httpx2
import pytest

from server.manifest import Release, read
from tests.e2e.engine.deployment import PROJECT, Deployment, docker, first_key, until
from tests.server.real import ROOT, absent

pytestmark = pytest.mark.e2e

SERVICES = ("ollama", "loader", "gateway")
REACHES = """
import json, socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3).close()
    print(json.dumps("reached"))
except OSError as error:
    print(json.dumps(type(error).__name__ if error.errno is None else error.errno))
"""
RENDERS = """
import asyncio, json, sys
from pathlib import Path
from server.engines.ollama import OllamaEngine
from server.manifest import read
async def render(release):
    engine = OllamaEngine("http://ollama:11434", 1)
    rendered = [await engine.render(release.model, probe.conversation) for probe in release.probes]
    await engine.close()
    return rendered
print(json.dumps(asyncio.run(render(read(Path("output/gguf/current"))))))
"""


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path_factory.mktemp("deployment") / "gguf")
    deployment.releases.mkdir()
    deployment.compose("down", "--volumes")
    before = deployment.image()
    deployment.compose("build", "--quiet", "gateway")
    if before not in ("", deployment.image()):
        subprocess.run(["docker", "rmi", before], capture_output=True)
    yield deployment
    deployment.http.close()
    deployment.make("down", "ARGS=--volumes")


@pytest.fixture(scope="module")
def second(demo_release: Release, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The demo's release once more, with bytes of its own: zeros at the end of a GGUF mean nothing."""
    name = "second-0123456789ab"
    directory = shutil.copytree(demo_release.directory, tmp_path_factory.mktemp("second") / name)
    made = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    file = made["files"]["gguf"]
    content = demo_release.gguf.read_bytes() + bytes(32)
    (directory / file["path"]).write_bytes(content)
    file |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(made | {"release": name}), encoding="utf-8")
    return read(directory)


def test_without_a_release_everything_starts_shows_a_key_and_says_what_is_missing(compose: Deployment) -> None:
    key = first_key(compose.make("up"))
    assert httpx2.get(f"{compose.url}/healthz", trust_env=False).status_code == 200
    for path in ("/readyz", "/v1/models"):  # the page shows what the second one says
        reply = httpx2.get(f"{compose.url}{path}", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
        assert reply.status_code == 503 and "no release yet in output/gguf" in reply.text
    until(lambda: bool(compose.said("loader")), 60)
    [line] = compose.said("loader")
    assert "make demo" in line and "make train" in line


def test_a_release_that_comes_is_loaded_and_answers_through_the_published_port(compose: Deployment, demo_release: Release) -> None:
    compose.expose(demo_release)
    compose.wait_for(demo_release.model)
    until(lambda: f"release: {demo_release.model} is wanted from now on, on the CPU" in compose.said("loader"), 30)
    assert compose.http.get("/v1/models").json()["data"][0]["trinity"]["device"] == "cpu"
    assert compose.python("gateway", RENDERS) == [probe.prompt for probe in demo_release.probes]
    for probe in demo_release.probes:
        messages = [message.model_dump() for message in probe.messages]
        told = compose.http.post("/chat", json={"messages": messages, "temperature": 0}).json()
        assert (told["usage"]["prompt_tokens"], told["finish_reason"]) == (len(probe.prompt_ids), "stop")
        assert told["message"]["content"]


def test_the_memory_limit_is_what_the_release_needs(compose: Deployment) -> None:
    compose.make("up")
    limit = compose.inspect("ollama")["HostConfig"]["Memory"]
    assert limit == int(compose.compose("exec", "-T", "loader", "python", "-m", "server", "release", "memory"))
    assert 2 << 30 < limit < 4 << 30
    until(lambda: compose.ready().get("status") == "ready", 60, compose.ready)
    assert "ok    it answers" in compose.make("smoke")
    assert any("prompt cache is enabled, size limit: 1024 MiB" in line for line in compose.said("ollama")), "Ollama hands it on"


def test_only_the_gateway_can_be_reached_and_only_with_a_key(compose: Deployment) -> None:
    assert compose.inspect("gateway")["NetworkSettings"]["Ports"].keys() == {f"{compose.port}/tcp", "8080/tcp"}
    assert docker("port", compose.inspect("ollama")["Id"]) == ""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 11434), timeout=3)
    networks = compose.inspect("ollama")["NetworkSettings"]["Networks"]
    address = networks[f"{PROJECT}_engine"]["IPAddress"]
    assert list(networks) == [f"{PROJECT}_engine"]
    for network in ("bridge", f"{PROJECT}_edge"):
        assert json.loads(compose.aside("--network", network, program=REACHES, words=(address, "11434"))) != "reached"
    assert compose.python("loader", REACHES, address, "11434") == "reached", "the same question from inside"
    assert docker("network", "inspect", "--format", "{{.Internal}}", f"{PROJECT}_engine").strip() == "true", "no way out"
    assert httpx2.get(f"http://{address}:11434/api/version", trust_env=False).status_code == 200, "the host itself gets in, as the docs say"
    wrong = {"Authorization": "Bearer tr-wrong"}
    assert httpx2.post(f"{compose.url}/chat", json={"message": "Hi"}, headers=wrong, trust_env=False).status_code == 401


def test_the_servers_image_is_small(compose: Deployment) -> None:
    base = os.environ.get("BASE_IMAGE") or "python:3.13-slim-bookworm"
    if "BASE_IMAGE" not in os.environ:
        docker("pull", "--quiet", base)  # BuildKit keeps it to itself
    whole, below = (int(docker("image", "inspect", "--format", "{{.Size}}", name)) for name in (f"{PROJECT}-server", base))
    assert 0 < whole - below < 250e6


def test_every_container_is_confined(compose: Deployment) -> None:
    for service in SERVICES:
        found = compose.inspect(service)["HostConfig"]
        assert found["ReadonlyRootfs"] and found["CapDrop"] == ["ALL"] and found["Memory"] and found["PidsLimit"]
        assert "no-new-privileges:true" in found["SecurityOpt"] and found["RestartPolicy"]["Name"] == "unless-stopped"
    for service in ("loader", "gateway"):
        assert compose.python(service, "import json, os; print(json.dumps(os.getuid()))") == 10001
        assert compose.python(service, "import importlib.util, json; print(json.dumps(importlib.util.find_spec('torch')))") is None


@pytest.mark.parametrize("service", ["ollama", "gateway"])
def test_a_killed_main_process_comes_back_and_answers(compose: Deployment, demo_release: Release, service: str) -> None:
    before = compose.inspect(service)
    compose.kill_main_process(service)
    until(lambda: compose.inspect(service)["RestartCount"] > before["RestartCount"], 30)
    compose.wait_for(demo_release.model)
    assert compose.chat("Every weekday at 07:30")["finish_reason"] == "stop"


def test_a_second_release_takes_over_without_a_failed_request(compose: Deployment, demo_release: Release, second: Release) -> None:
    answered: list[tuple[int, str]] = []
    ending = threading.Event()

    def keep_asking() -> None:
        while not ending.is_set():
            reply = compose.http.post("/chat", json={"message": "Every weekday at 07:30"})
            answered.append((reply.status_code, reply.json().get("model", reply.text)))

    clients = [threading.Thread(target=keep_asking) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        until(lambda: len(answered) > 5, 180)
        compose.expose(second)
        until(lambda: (200, second.model) in answered[-3:], 240, lambda: (answered[-3:], compose.said("loader")))
    finally:
        ending.set()
        for client in clients:
            client.join()
    assert set(answered) == {(200, demo_release.model), (200, second.model)}


def test_a_rollback_stays_and_a_backup_holds_what_cannot_be_made_again(compose: Deployment, demo_release: Release) -> None:
    compose.compose("exec", "-T", "loader", "python", "-m", "server", "release", "rollback")
    compose.wait_for(demo_release.model)
    tar = ["docker/compose", "run", "--rm", "--no-deps", "-T", "--entrypoint", "tar", "loader", "-C", "output/state"]
    kept = compose.piped(*tar, "-c", ".")
    with tarfile.open(fileobj=io.BytesIO(kept)) as file:
        assert {"./keys.json", "./release.json"} <= set(file.getnames())
    lost = compose.compose("exec", "-T", "loader", "sh", "-c", "rm output/state/keys.json output/state/release.json; ls output/state")
    assert "json" not in lost
    compose.piped(*tar, "-x", given=kept)
    compose.wait_for(demo_release.model)
    assert compose.chat("Every weekday at 07:30")["model"] == demo_release.model, "the same key opens it again"


def test_down_and_up_keep_model_and_keys_even_where_the_releases_are_gone(compose: Deployment, demo_release: Release) -> None:
    compose.make("down")
    assert compose.compose("ps", "--all", "--quiet") == ""
    away = compose.releases.with_name("away")
    compose.releases.rename(away)
    compose.releases.mkdir()
    compose.make("up")
    compose.wait_for(demo_release.model)
    assert compose.chat("Every weekday at 07:30")["model"] == demo_release.model
    compose.releases.rmdir()
    away.rename(compose.releases)


def test_after_a_restart_of_the_engine_everything_is_there_again(compose: Deployment, demo_release: Release) -> None:
    """TRINITY_DOCKER_RESTART: the command that restarts this machine's Docker engine."""
    command = os.environ.get("TRINITY_DOCKER_RESTART") or absent("TRINITY_DOCKER_RESTART does not say how to restart Docker")
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    compose.wait_for(demo_release.model)
    assert compose.chat("Every weekday at 07:30")["model"] == demo_release.model
