"""The documents' commands as they stand, in a copy of the checkout with the demo's run and release in it; only ports are others.

`make -o setup`: the environment is the one that these tests run in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.manifest import Release
from tests.docs_commands import run_here
from tests.server.real import ROOT, OllamaProcess, absent, clean_environment, free_port, link_or_copy

pytestmark = pytest.mark.e2e

NOT_READY = 2
"""What the doctor says of the 12B where there is no card; make makes 2 of anything."""


class Checkout:
    """A copy of what git knows; the environment and the demo's run and release are this checkout's."""

    def __init__(self, folder: Path, release: Release) -> None:
        self.folder = folder
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        shutil.copytree(release.directory, folder / "output" / "gguf" / release.manifest.release, copy_function=link_or_copy)
        self.port = free_port()
        self.make_current(release.manifest.release)

    def make_current(self, name: str) -> None:
        link = self.folder / "output" / "gguf" / "new"
        link.symlink_to(name)
        link.replace(self.folder / "output" / "gguf" / "current")

    def _start(self, command: str, **pipes: Any) -> subprocess.Popen[str]:
        line = command.replace("localhost:8080", f"localhost:{self.port}").replace("--port 9000", f"--port {self.port}")
        line = re.sub(r"^make ", "make -o setup ", line)
        search = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
        environment = clean_environment(TRINITY_PORT=str(self.port), TRINITY_THREADS="1", OMP_WAIT_POLICY="passive", PATH=search)
        return subprocess.Popen(["bash", "-c", line], cwd=self.folder, env=environment, text=True, start_new_session=True, **pipes)

    def run(self, command: str, typed: str = "", code: int = 0) -> str:
        process = self._start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(typed, timeout=180)
        assert process.returncode == code, f"{command}: {process.returncode}\n{out}{err}"
        return out + err

    @contextmanager
    def running(self, command: str, says: str) -> Iterator[str]:
        """One that stays: yields what it has said once `says` is among it, and ends it."""
        log = self.folder / "running.log"
        with log.open("w") as file:
            process = self._start(command, stdin=subprocess.DEVNULL, stdout=file.fileno(), stderr=file.fileno())
        try:
            deadline = time.monotonic() + 120
            while says not in log.read_text():
                assert time.monotonic() < deadline and process.poll() is None, f"{command}: {log.read_text()}"
                time.sleep(0.2)
            yield log.read_text()
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)

    @contextmanager
    def serving(self, command: str) -> Iterator[str]:
        with self.running(command, "server: http") as said:
            deadline = time.monotonic() + 180
            while httpx2.get(f"http://127.0.0.1:{self.port}/readyz", trust_env=False).status_code != 200:
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield said


@pytest.fixture(scope="module")
def checkout(demo_release: Release, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("docs") / "trinity", demo_release)


def test_the_plan_counts_and_the_doctor_answers(checkout: Checkout) -> None:
    for command in run_here("make plan") + run_here(".venv/bin/python -m trainer plan"):
        assert "fits: " in checkout.run(command)
    for command in run_here("make doctor"):
        small = "270m" in command
        assert "for gemma3-" in checkout.run(command, code=0 if small else NOT_READY)
    for command in run_here("make -s doctor"):
        assert '"lines": [' in checkout.run(command, code=NOT_READY)


def test_a_stage_that_is_up_to_date_is_done_at_once_and_a_push_lists_its_files(checkout: Checkout, demo_release: Release) -> None:
    runs = ROOT / "output" / "runs"
    if not (runs / "gemma3-270m-cpu").is_dir():
        absent("no run beside the release: run `make demo` first")
    name = "gemma3-270m-cpu"
    shutil.copytree(runs / name, checkout.folder / "output" / "runs" / name, copy_function=link_or_copy)
    for command in run_here(".venv/bin/python -m trainer export"):
        assert "export: up to date" in checkout.run(command)
    for command in run_here("make push REPO=ada/cron-gemma DRY=1"):  # the 12B was not trained here
        assert demo_release.gguf.name in checkout.run(f"{command} PRESET={name}")


def test_the_server_s_environment_and_the_hook_are_made(checkout: Checkout) -> None:
    for command in run_here("make setup-server"):
        checkout.run(command)
        assert "--queue-timeout-s" in checkout.run(".venv-server/bin/python -m server --help")
    subprocess.run(["git", "init", "--quiet"], cwd=checkout.folder, check=True)
    for command in run_here(".venv/bin/pre-commit install"):
        checkout.run(command)
        assert (checkout.folder / ".git" / "hooks" / "pre-commit").is_file()


def test_every_curl_and_the_sdk_get_answers_and_the_terminal_too(checkout: Checkout, demo_release: Release) -> None:
    [plain, *_] = run_here("make serve")
    question = "Every weekday at 07:30"
    with checkout.serving(plain):
        for command in run_here("curl "):
            said = checkout.run(command)
            assert ("data: [DONE]" in said) if '"stream": true' in command else ("error" not in json.loads(said)), said
        for program in run_here("from openai import"):
            lines = program.replace("127.0.0.1:8080", f"127.0.0.1:{checkout.port}")
            assert len(checkout.run(f"python - <<'END'\n{lines}\nEND").split()) == 5, "a cron expression"
        for command in run_here("make chat"):
            assert len(checkout.run(command, typed=f"{question}\n").split()) >= 5


def test_every_way_to_serve_serves(checkout: Checkout, ollama_process: OllamaProcess) -> None:
    for command in run_here("make serve")[1:]:
        with checkout.serving(command.replace("http://127.0.0.1:11434", ollama_process.url)) as said:
            assert ("tr-" in said) == ("--host" in command), said
    for command in run_here("make key"):
        assert "tr-" in checkout.run(command)


def test_releases_are_loaded_listed_watched_and_rolled_back(checkout: Checkout, demo_release: Release) -> None:
    first, second = demo_release.manifest.release, "second-0123456789ab"
    folder = checkout.folder / "output" / "gguf"
    shutil.copytree(folder / first, folder / second, copy_function=link_or_copy)
    manifest = json.loads((folder / second / "manifest.json").read_text(encoding="utf-8"))
    (folder / second / "manifest.json").unlink()
    (folder / second / "manifest.json").write_text(json.dumps(manifest | {"release": second}), encoding="utf-8")
    written = run_here("python -m server release") + run_here(".venv/bin/python -m server release")  # the same python here: once is enough
    by_end = {command.rpartition("release ")[2]: command for command in written}
    assert set(by_end) == {"load", "load --watch", "list", "status", "rollback"}
    assert first in checkout.run(by_end["load"])
    with checkout.running(by_end["load --watch"], first):
        checkout.make_current(second)
        deadline = time.monotonic() + 60
        while second not in (folder.parent / "state" / "release.json").read_text(encoding="utf-8"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert second in checkout.run(by_end["status"]) and first in checkout.run(by_end["list"])
    assert first in checkout.run(by_end["rollback"])
