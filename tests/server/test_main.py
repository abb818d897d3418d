"""`python -m server` as a person meets it: what they can mend is one line and exit code 2; and the real thing, once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.manifest import Release
from tests.server.real import ROOT, clean_environment, free_port, gateway, lives
from tests.server.scripted import small_release, sse


def run(*flags: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "server", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60, env=clean_environment(**environment)
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr if done.returncode else done.stdout


def test_help_names_every_setting_and_the_exit_codes() -> None:
    code, text = run("--help")
    assert code == 0
    assert all(word in text for word in ("--engine", "--releases", "--port", "--ollama-url", "--threads", "--slots", "Exit codes"))


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with gateway("--releases", str(tmp_path)) as running:
        port = running.url.rpartition(":")[2]
        code, text = run("--releases", str(tmp_path), "--port", port)
    assert (code, text.count("\n")) == (2, 1)
    assert f"port {port} is taken" in text and "--port" in text


def test_an_ollama_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, text = run("--releases", str(small_release(tmp_path)), "--port", "0", TRINITY_ENGINE="ollama", TRINITY_OLLAMA_URL=url)
    assert (code, text.count("\n")) == (2, 1)
    assert f"no Ollama answers at {url}" in text and "ollama serve" in text


@pytest.mark.parametrize("url", ["http://[::1", "http://h:99999", "http://127.0.0.1:x", "ftp://h"])
def test_an_address_that_is_none_is_one_line(url: str) -> None:
    code, text = run("--port", "0", "--engine", "ollama", "--ollama-url", url)
    assert (code, text.count("\n")) == (2, 1)
    assert "ollama_url" in text and url in text


def test_a_host_that_is_none_is_one_line() -> None:
    code, text = run("--port", "0", "--host", "a" * 80)
    assert (code, text.count("\n")) == (2, 1)
    assert "--host" in text and "no such address" in text


def test_a_broken_manifest_and_a_changed_gguf_are_one_line_each(tmp_path: Path) -> None:
    directory = small_release(tmp_path)
    (directory / "model.gguf").write_bytes(b"GGUF and nothing elsf")
    changed = run("--releases", str(tmp_path), "--port", "0")
    (directory / "manifest.json").write_text("{")
    broken = run("--releases", str(tmp_path), "--port", "0")
    assert changed[0] == broken[0] == 2
    assert changed[1].count("\n") == broken[1].count("\n") == 1
    assert "was changed after its release" in changed[1] and "not valid JSON" in broken[1]


def test_settings_that_cannot_be_are_all_named() -> None:
    code, text = run("--port", "99999", TRINITY_ENGINE="abacus")
    assert code == 2
    assert "port" in text and "99999" in text and "engine" in text and "abacus" in text
    assert run("--colour", "red")[0] == 2


def test_without_a_release_it_starts_says_what_to_run_and_stops_when_asked(tmp_path: Path) -> None:
    with gateway("--releases", str(tmp_path)) as running:
        assert running.http.get("/healthz").json() == {"status": "ok"}
        assert "make demo" in running.http.get("/readyz").json()["error"]["message"]
        code = running.stop()
    assert code == 0
    assert any("make demo" in line for line in running.lines)


def test_a_release_is_served_by_the_embedded_engine_which_may_die_and_dies_with_the_gateway(release: Release) -> None:
    with gateway("--releases", str(release.directory), "--threads", "1") as running:
        assert running.wait_ready()["model"] == release.model
        probe = release.probes[0]
        body = {"message": probe.messages[0].content, "temperature": 0}
        whole = running.http.post("/chat", json=body).json()
        stream = running.http.post("/chat", json={**body, "stream": True})
        assert whole["message"]["content"] == probe.answer
        assert (whole["finish_reason"], whole["usage"]["prompt_tokens"]) == ("stop", len(probe.prompt_ids))
        assert "".join(item["delta"].get("content", "") for item in sse(stream.text)[:-1]) == probe.answer

        [child] = children(running.process.pid)
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: running.http.get("/readyz").status_code == 503)
        running.wait_ready()
        assert running.http.post("/chat", json=body).json()["message"]["content"] == probe.answer

        [child] = children(running.process.pid)
        running.stop(signal.SIGKILL)
        wait_for(lambda: not lives(child))
    said = "\n".join(running.lines)
    assert "POST /chat" in said and probe.messages[0].content not in said, "prompts are nobody's business in a log"


def test_a_key_is_all_that_key_prints_and_opens_at_once_what_it_closes(tmp_path: Path) -> None:
    with gateway("--releases", str(tmp_path), "--state", str(tmp_path)) as running:
        assert running.http.get("/v1/models").status_code == 503
        code, made = run("key", "--state", str(tmp_path), "--name", "alice", "--key-requests-per-minute", "2")
        assert (code, made.count("\n")) == (0, 1) and made.startswith("tr-")
        assert running.http.get("/v1/models").status_code == 401
        running.http.headers["Authorization"] = f"Bearer {made.strip()}"
        asked = [running.http.post("/chat", json={"message": "Hi"}).status_code for _ in range(3)]
        assert asked == [503, 503, 429], "no release yet, and then the key's own limit"
        assert run("key", "--state", str(tmp_path), "--remove", "alice")[0] == 0
        assert running.http.get("/v1/models").status_code == 503
    assert made.strip() not in "\n".join(running.lines)
    code, text = run("key", "--state", str(tmp_path), "--remove", "alice")
    assert (code, text.count("\n")) == (2, 1) and "no key named alice" in text


def test_the_first_start_beyond_the_loopback_makes_one_key_and_shows_it_once(tmp_path: Path) -> None:
    everywhere = "0.0.0.0"  # noqa: S104  # what this test is about
    flags = ("--releases", str(tmp_path), "--host", everywhere, "--keys", str(tmp_path / "volume" / "keys.json"))
    with gateway(*flags) as running:
        assert running.http.get("/v1/models").status_code == 401
        said = "\n".join(running.lines)
        [secret] = set(re.findall(r"tr-[A-Za-z0-9_-]{43}", said))
        port = running.url.rpartition(":")[2]
        assert f"http://localhost:{port}/#key={secret}" in said
        assert running.http.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 503
    with gateway(*flags) as again:
        assert again.http.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 503
    assert "tr-" not in "\n".join(again.lines)


def test_check_says_what_is_well_and_what_is_not_without_starting_anything(tmp_path: Path) -> None:
    small_release(tmp_path)
    well = run("check", "--releases", str(tmp_path), "--state", str(tmp_path))
    assert well[0] == 0
    assert [line.split()[:2] for line in well[1].splitlines()] == [["ok", f"{name}:"] for name in ("settings", "keys", "release", "engine")]
    (tmp_path / "keys.json").write_text("{")
    ill = check_output(
        "--releases", str(tmp_path / "none"), "--state", str(tmp_path), "--engine", "ollama", "--ollama-url", "http://127.0.0.1:1"
    )
    assert ill[0] == 2
    assert [line.split()[:2] for line in ill[1].splitlines()][1:] == [["PROBLEM", f"{name}:"] for name in ("keys", "release", "engine")]
    assert "make demo" in ill[1] and "ollama serve" in ill[1]
    assert run("check", "--port", "x")[0] == 2


def check_output(*flags: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "server", "check", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60, env=clean_environment()
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_log_for_programs_is_json_lines(tmp_path: Path) -> None:
    with gateway("--releases", str(tmp_path), "--log-format", "json") as running:
        running.http.get("/readyz", headers={"X-Request-ID": "mine"})
    found = [json.loads(line) for line in running.lines if line.startswith("{")]
    [line] = [line for line in found if line.get("request_id") == "mine"]
    assert (line["path"], line["status"], line["level"]) == ("/readyz", 503, "info")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: object, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("word", ["torch", "transformers", "unsloth", "trainer", "xllamacpp"])
def test_the_gateway_imports_nothing_heavy_and_nothing_of_the_trainer(word: str) -> None:
    code = "import sys, server.__main__, server.engines.embedded, server.engines.ollama; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert word not in names
