"""The doctor on this machine, for real: what it asks, how long it takes, and that it neither imports torch nor needs anything installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.local_site import serving, url
from trainer import doctor

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    *("system", "python", "compiler", "headers", "driver", "card", "card memory", "torch", "memory", "disk", "docker", "compose"),
    *("gpu runtime", "gpu container", "ollama", "port 8080", "port 11434", "model", "pins"),
]


class Hub(BaseHTTPRequestHandler):
    """Answers as the model hub does: a gated model's page is everybody's, its files are not."""

    def do_GET(self) -> None:
        allowed = {"Bearer mine": (200, {}), None: (401, {"error": "Access to model a/gated is restricted. Please log in."})}
        refused = (403, {"error": "Access to model a/gated is restricted and you are not in the authorized list."})
        known = {
            "/api/models/a/public": (200, {"sha": "f" * 40, "gated": False}),
            "/api/models/a/gated": (200, {"sha": "e" * 40, "gated": "manual"}),
            "/api/models/a/gated/auth-check": allowed.get(self.headers.get("Authorization"), refused),
            "/api/models/a/old": (200, {"sha": "d" * 40, "gated": "auto"}),
        }
        status, body = known.get(self.path, (404, {"error": "Repository not found"}))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serving(Hub) as server:
        yield url(server)


def asked(name: str, cache: Path, **environment: str) -> str:
    line = doctor._model(doctor.Needs("p", model=name, cache=cache), {"HF_HOME": str(cache), **environment})
    return f"{line.status} {line.found}"


def test_it_answers_within_ten_seconds_and_fails_only_with_a_failing_line() -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "trainer", "doctor", "--json", "--preset", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert time.monotonic() - began < 10
    tree = json.loads(done.stdout)
    assert [line["name"] for line in tree["lines"]] == NAMES
    assert tree["ready"] == (done.returncode == 0) == all(line["status"] != "fail" for line in tree["lines"])
    assert all(line["remedy"] for line in tree["lines"] if line["status"] != "ok")
    states = {line["name"]: line["status"] for line in tree["lines"]}
    assert {states[name] for name in ("system", "python", "torch", "memory", "disk", "model")} == {"ok"}


def test_a_t4_under_an_old_driver_is_told_what_helps(tmp_path: Path) -> None:
    """nvidia-smi is a fake that says so; torch is this machine's."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Tesla T4, 535.104.05, 7.5, 15360, 15095'\n")
    smi.chmod(0o755)
    command = [sys.executable, "-m", "trainer", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    lines = {line["name"]: line for line in json.loads(done.stdout)["lines"]}
    assert done.returncode == 2
    assert lines["driver"]["found"] == "NVIDIA 535.104.05"
    assert lines["card"] == {"name": "card", "status": "ok", "found": "Tesla T4 (sm_75)", "remedy": ""}
    assert lines["card memory"]["status"] == "ok", "15,095 MiB hold the preset"
    assert lines["torch"]["status"] == "fail"
    assert "$(requirements/setup.sh uv) pip install " in lines["torch"]["remedy"]
    assert "--torch-backend=auto torch==" in lines["torch"]["remedy"]
    assert "cuda>=13.0" in lines["gpu container"]["found"] or lines["gpu container"]["status"] == "warn"


def test_a_broken_setting_is_told_like_everywhere() -> None:
    command = [sys.executable, "-m", "trainer", "doctor", "--set", "train.epoch=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "train.epoch: no such key" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_imports_no_torch() -> None:
    code = "import sys; from trainer import doctor; doctor.main(['--preset', 'tiny'], {}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False", done.stdout + done.stderr


def test_it_runs_by_a_bare_python_before_anything_is_installed(tmp_path: Path) -> None:
    """-S: no site-packages, as on a machine where `make setup` never ran."""
    shutil.copytree(ROOT / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-S", "-m", "trainer.doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "-> make setup" in done.stdout
    assert "not looked at before make setup" in done.stdout
    assert "NOT ready for gemma3-12b-t4" in done.stdout


def test_the_hub_is_asked_with_the_token_that_is_there(hub: str, tmp_path: Path) -> None:
    there = {"HF_ENDPOINT": hub}
    assert asked("a/public", tmp_path, **there) == f"ok a/public is on the hub, at {'f' * 12}"
    assert asked("a/gated", tmp_path, **there) == "fail a/gated is gated"
    assert asked("a/gated", tmp_path, HF_TOKEN="another's", **there) == "fail a/gated is gated"
    assert asked("a/gated", tmp_path, HF_TOKEN="mine", **there).startswith("ok")
    assert asked("a/old", tmp_path, **there).startswith("ok"), "a mirror that knows no auth-check"
    (tmp_path / "token").write_text("mine\n")
    assert asked("a/gated", tmp_path, **there).startswith("ok")
    assert asked("a/typo", tmp_path, **there) == "fail a/typo: no such public model"
    assert "cannot be reached" in asked("a/public", tmp_path, HF_ENDPOINT="http://127.0.0.1:1")


def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    state = tmp_path / "nf4" / "public-float16-0123456789ab"
    state.mkdir(parents=True)
    assert asked("a/public", tmp_path, **nowhere).startswith("fail")
    (state / "config.json").write_text("{}")
    assert asked("a/public", tmp_path, **nowhere) == "ok a/public lies in the cache"


def test_a_port_that_somebody_holds_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        assert doctor.is_taken(held.getsockname()[1])
        number = held.getsockname()[1]
    assert not doctor.is_taken(number)


def test_what_the_cache_holds_already_is_not_asked_for_again(tmp_path: Path) -> None:
    paths = [f"paths.cache={tmp_path}", f"paths.output={tmp_path}"]
    before = doctor.needs("gemma3-270m-cpu", paths)
    (tmp_path / "there").write_bytes(bytes(1000))
    after = doctor.needs("gemma3-270m-cpu", paths)
    assert before.cache_bytes is not None
    assert after.cache_bytes == before.cache_bytes - 1000
    (place,) = doctor.places(after)
    assert place.least_bytes is not None
    assert place.all_bytes is not None
    assert place.least_bytes < place.all_bytes


def test_torch_is_known_without_importing_it() -> None:
    found = doctor.installed_torch()
    assert found is not None
    assert found.version.startswith("2.")


def test_a_command_that_is_absent_says_nothing() -> None:
    assert doctor.ask(("no-such-command",)).code is None
    assert doctor.ask(("sh", "-c", "echo out; echo err >&2; exit 3")) == (3, "out\n", "err\n")


def test_the_page_about_the_machine_names_every_line_and_its_commands_exist() -> None:
    page = (ROOT / "docs" / "machine.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z, ]+) \|", page, flags=re.MULTILINE)
    named = {name for row in rows for name in row.split(", ")} - {"line"}
    assert named == {"ports" if name.startswith("port ") else name for name in NAMES}
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    wanted = re.findall(r"(?:^|`)make (?:-s )?([a-z0-9-]+)", page, flags=re.MULTILINE)
    assert len(wanted) > 6
    assert set(wanted) <= targets
    for arguments in re.findall(r"make (?:-s )?doctor (?:ARGS=)?(.*?) *(?:#.*)?$", page, flags=re.MULTILINE):
        doctor._parser().parse_args(arguments.replace("PRESET=", "--preset=").split())
