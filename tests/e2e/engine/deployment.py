"""compose.yaml as a user runs it, by make, with a project, a port and releases of its own, on a real Docker engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2

from server.manifest import Release
from tests.server.real import ROOT, absent, clean_environment, free_port, link_or_copy, ollama_binary

PROJECT = "trinity-e2e"


class Deployment:
    def __init__(self, releases: Path) -> None:
        """The images are brought up to date first: layers of what did not change come from Docker's cache."""
        if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
            absent("no Docker engine answers: start one, or name it in DOCKER_HOST")
        self.releases = releases
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        base = os.environ.get("BASE_IMAGE")
        self._environment = clean_environment(
            COMPOSE_PROJECT_NAME=PROJECT,
            TRINITY_PORT=str(self.port),
            TRINITY_RELEASES=str(releases),
            TRINITY_SERVER_IMAGE=f"{PROJECT}-server",
            OLLAMA_IMAGE=_ollama_image(base),
            BUILD_NETWORK="host",
            GPU="no",
            LLAMA_ARG_THREADS="1",  # llama.cpp's threads wait for each other by spinning, whoever else needs the cores
            **({"SERVER_BASE_IMAGE": base} if base else {}),
        )

    def make(self, *words: str) -> str:
        """What it printed; it must have gone well."""
        return self._run("make", "--silent", *words)

    def compose(self, *words: str) -> str:
        return self._run("docker/compose", *words)

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def piped(self, *command: str, given: bytes = b"") -> bytes:
        """The bytes that it printed, with `given` on its stdin."""
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, input=given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def image(self) -> str:
        """The server image's id; empty where there is none."""
        command = ["docker", "image", "inspect", "--format", "{{.Id}}", f"{PROJECT}-server"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def said(self, service: str) -> list[str]:
        return [line for line in self.compose("logs", "--no-log-prefix", service).splitlines() if line]

    def python(self, service: str, program: str, *words: str) -> Any:
        """The JSON that a program of ours prints inside a container."""
        return json.loads(self.compose("exec", "-T", service, "python", "-c", program, *words))

    def inspect(self, service: str) -> Any:
        return json.loads(docker("inspect", self.compose("ps", "--all", "--quiet", service).strip()))[0]

    @cached_property
    def http(self) -> httpx2.Client:
        """A client with a key that is no narrower than a test."""
        words = ("--name", "test", "--key-requests-per-minute", "1000000", "--key-concurrent", "100")
        key = self.compose("exec", "-T", "gateway", "python", "-m", "server", "key", *words).strip()
        return httpx2.Client(base_url=self.url, timeout=120, trust_env=False, headers={"Authorization": f"Bearer {key}"})

    def wait_for(self, model: str, timeout_s: float = 240) -> None:
        until(lambda: self.ready().get("model") == model, timeout_s, self.ready)

    def ready(self) -> dict[str, Any]:
        """What /readyz tells; empty where the gateway does not answer."""
        try:
            told: dict[str, Any] = self.http.get("/readyz").json()
        except httpx2.TransportError:
            return {}
        return told

    def chat(self, message: str) -> dict[str, Any]:
        reply = self.http.post("/chat", json={"message": message, "temperature": 0})
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()
        return told

    def expose(self, release: Release) -> None:
        """As the trainer does: a directory of its own, then the link."""
        shutil.copytree(release.directory, self.releases / release.manifest.release, copy_function=link_or_copy, dirs_exist_ok=True)
        link = self.releases / "current.new"
        link.symlink_to(release.manifest.release)
        link.replace(self.releases / "current")

    def kill_main_process(self, service: str) -> None:
        """Not Docker's init, whose child it is, and from a container that sees the host's processes: `docker kill` would count as wanted."""
        number = str(self.inspect(service)["State"]["Pid"])
        program = "import os, sys; os.kill(int(open('/proc/{0}/task/{0}/children'.format(sys.argv[1])).read().split()[0]), 9)"
        self.aside("--pid", "host", "--user", "0", program=program, words=(number,))

    def aside(self, *flags: str, program: str, words: tuple[str, ...] = ()) -> str:
        """What a program prints in a container that is none of the project's."""
        return docker("run", "--rm", *flags, "--entrypoint", "python", f"{PROJECT}-server", "-c", program, *words)


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"docker {shlex.join(words)}: {done.stderr}"
    return done.stdout


def until(condition: Callable[[], bool], timeout_s: float, why: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s: {why()}"
        time.sleep(0.2)


def first_key(said: str) -> str:
    keys: set[str] = set(re.findall(r"tr-[A-Za-z0-9_-]{43}", said))
    assert len(keys) == 1, said
    return keys.pop()


def _ollama_image(base: str | None) -> str:
    """OLLAMA_IMAGE, else one around the binary that the other tests use, else nobody's: compose.yaml's own."""
    if named := os.environ.get("OLLAMA_IMAGE"):
        return named
    binary = ollama_binary()
    if base is None or binary is None:
        return ""
    name, file = f"{PROJECT}-ollama", ROOT / "tests" / "e2e" / "engine" / "ollama.Dockerfile"
    prefix = Path(binary).resolve().parents[1]
    docker("build", "--quiet", "--tag", name, "--build-arg", f"BASE_IMAGE={base}", "--file", str(file), str(prefix))
    return name
