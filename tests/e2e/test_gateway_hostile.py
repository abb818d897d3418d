"""The gateway's process with real engines: clients that leave, engines that are killed, a queue that is full, a stop in mid-stream."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.auth import Keys
from server.limits import Limits
from server.manifest import Release
from tests.server.real import GatewayProcess, OllamaProcess, gateway, ollama
from tests.server.scripted import sse

pytestmark = pytest.mark.e2e
COUNTING = {"message": "1, 2, 3, 4, 5, 6,", "temperature": 0, "max_tokens": 120, "stream": True}
"""The untrained model counts on until its context is full: an answer that surely lasts."""
GONE = r'answers_total\{outcome="client_gone"\}'
SHORT = {"message": "1, 2, 3, 4, 5, 6,", "temperature": 0, "max_tokens": 2}


@pytest.fixture(scope="module", params=["embedded", "ollama"])
def flags(request: pytest.FixtureRequest, release: Release) -> list[str]:
    """Of a gateway with one slot over each engine."""
    chosen = ["--releases", str(release.directory), "--engine", request.param, "--threads", "1", "--waiting", "2"]
    if request.param == "ollama":
        process: OllamaProcess = request.getfixturevalue("ollama_process")
        chosen += ["--ollama-url", process.url]
    return chosen


@pytest.fixture(scope="module")
def running(flags: list[str]) -> Iterator[GatewayProcess]:
    """One for all tests that leave it as it was."""
    with gateway(*flags, "--header-timeout-s", "3") as process:
        process.wait_ready()
        yield process


Start = Callable[..., GatewayProcess]


@pytest.fixture
def start(flags: list[str]) -> Iterator[Start]:
    """Starts one with further flags."""
    started: list[GatewayProcess] = []

    def begin(*more: str) -> GatewayProcess:
        started.append(GatewayProcess(*flags, *more))
        started[-1].wait_ready()
        return started[-1]

    yield begin
    for process in started:
        process.stop()


@contextmanager
def streaming(gateway: GatewayProcess) -> Iterator[Iterator[str]]:
    """A long answer that has begun: the rest of its lines."""
    with gateway.http.stream("POST", "/chat", json=COUNTING) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()
        assert '"content"' in next(lines)
        yield lines


def sample(gateway: GatewayProcess, name: str) -> float:
    found = re.search(rf"^trinity_{name} (\S+)$", gateway.http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rest(lines: Iterator[str]) -> list[Any]:
    return sse("\n\n".join(line for line in lines if line))


def failed(lines: Iterator[str]) -> dict[str, Any]:
    """The error that ends a stream, which says nothing after it."""
    events = rest(lines)
    assert "[DONE]" not in events
    error: dict[str, Any] = events[-1]["error"]
    return error


def test_a_client_that_hangs_up_frees_the_engine_within_a_second(running: GatewayProcess) -> None:
    gone = sample(running, GONE)
    with streaming(running):
        assert sample(running, "answers_in_flight") == 1
    within(1, lambda: sample(running, "answers_in_flight") == 0)
    began = time.monotonic()
    assert running.http.post("/chat", json=SHORT).status_code == 200
    short = time.monotonic() - began
    began = time.monotonic()
    with streaming(running) as lines:
        assert sum('"content"' in line for line in lines) > 60
    assert short < (time.monotonic() - began) / 2, "the engine went on with what nobody reads"
    within(1, lambda: sample(running, GONE) == gone + 1)


def test_a_client_that_leaves_before_the_first_token_or_the_queue_leaves_nothing_behind(running: GatewayProcess) -> None:
    with streaming(running):
        with ThreadPoolExecutor(2) as clients:
            for _ in range(2):
                clients.submit(impatient, running.url)
        within(1, lambda: sample(running, "queue_length") == 0)
    within(1, lambda: sample(running, "answers_in_flight") == 0)
    assert running.http.post("/chat", json=SHORT).status_code == 200


def impatient(url: str) -> None:
    with suppress(httpx2.ReadTimeout):
        httpx2.post(f"{url}/chat", json=SHORT, timeout=0.5, trust_env=False)


def test_a_full_queue_refuses_with_retry_after_and_answers_the_others(running: GatewayProcess) -> None:
    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda _: running.http.post("/chat", json={**SHORT, "max_tokens": 40}), range(8)))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 3
    for reply in replies:
        if reply.status_code == 503:
            assert reply.headers["retry-after"] == "2" and reply.json()["error"]["code"] == "queue_full"


def test_a_prompt_that_is_too_long_is_a_400_with_both_numbers_never_a_shorter_prompt(running: GatewayProcess, release: Release) -> None:
    for stream in (False, True):
        reply = running.http.post("/chat", json={"message": "one two three " * 200, "stream": stream})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
        tokens, context = (int(number) for number in re.findall(r"\d+", error["message"])[:2])
        assert tokens > 600 and context == release.manifest.prompt.num_ctx


def test_a_stop_in_mid_stream_lets_the_answer_end_and_sends_the_rest_elsewhere(start: Start) -> None:
    running = start("--drain-s", "60")
    with streaming(running) as lines:
        running.process.send_signal(signal.SIGTERM)
        within(5, lambda: running.http.get("/readyz").status_code == 503)
        ready, new = running.http.get("/readyz"), running.http.post("/chat", json=SHORT)
        assert ready.json()["error"]["code"] == new.json()["error"]["code"] == "draining"
        assert new.headers["retry-after"] == "5"
        events = rest(lines)
    assert events[-1] == "[DONE]" and len(events) > 60
    assert running.process.wait(timeout=20) == 0


def test_a_stop_that_cannot_wait_ends_the_answer_with_an_error(start: Start) -> None:
    running = start("--drain-s", "0.2")
    with streaming(running) as lines:
        running.process.send_signal(signal.SIGTERM)
        assert failed(lines)["code"] == "draining"
    assert running.process.wait(timeout=20) == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_ollama_that_dies_in_mid_stream_is_a_typed_error_and_counted(how: signal.Signals, release: Release, tmp_path: Path) -> None:
    with ollama(tmp_path) as process:
        flags = ("--releases", str(release.directory), "--engine", "ollama", "--ollama-url", process.url)
        with gateway(*flags) as running:
            running.wait_ready()
            with streaming(running) as lines:
                process.process.send_signal(how)
                assert failed(lines)["code"] == "engine_failed"
            within(5, lambda: sample(running, r'engine_errors_total\{code="engine_failed"\}') == 1)  # after its event, as the stream ends
            process.process.wait(timeout=30)
            within(5, lambda: running.http.get("/readyz").status_code == 503)
            refused = running.http.post("/chat", json=SHORT)
            assert (refused.status_code, refused.headers["retry-after"]) == (502, "2")


def test_a_llama_server_that_is_killed_in_mid_stream_costs_that_answer_alone(release: Release, tmp_path: Path) -> None:
    with ollama(tmp_path) as process:
        flags = ("--releases", str(release.directory), "--engine", "ollama", "--ollama-url", process.url)
        with gateway(*flags) as running:
            running.wait_ready()
            with streaming(running) as lines:
                for pid in process.runners():
                    os.kill(pid, signal.SIGKILL)
                assert failed(lines)["code"] == "engine_failed"
            assert running.http.post("/chat", json=SHORT).status_code == 200


def test_keys_and_prompts_stay_out_of_everything_that_the_process_says(start: Start, tmp_path: Path) -> None:
    secret = Keys.open(tmp_path / "keys.json").make("alice", Limits(100, 9))
    running = start("--keys", str(tmp_path / "keys.json"), "--log-format", "json")
    words = "Xylophone zebra"
    for content in ({"message": words}, {"message": words * 200}, {"message": words, "temperature": words}, [words], {"messages": words}):
        for key in (secret, secret + "x"):
            running.http.post(f"/chat?key={key}&q={words}", json=content, headers={"Authorization": f"Bearer {key}"})
    with suppress(httpx2.HTTPError):
        running.http.post(
            "/chat", content=iter([json.dumps({"message": words}).encode(), b""]), headers={"Authorization": f"Bearer {secret}"}
        )
    running.stop()
    said = "\n".join(running.lines)
    assert said.count('"caller": "alice"') >= 5
    assert "Xylophone" not in said and secret not in said and secret.removeprefix("tr-") not in said


def test_slow_clients_by_the_hundred_keep_nobody_waiting(running: GatewayProcess) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    crowd = [httpx2.Client(trust_env=False) for _ in range(3)]  # and three who ask properly meanwhile
    stop = threading.Event()
    slow = threading.Thread(target=trickle, args=(host, int(port), stop))
    slow.start()
    try:
        time.sleep(0.5)
        for client in crowd:
            assert client.post(f"{running.url}/chat", json=SHORT, timeout=60).status_code == 200
    finally:
        stop.set()
        slow.join()
        for client in crowd:
            client.close()


def trickle(host: str, port: int, stop: threading.Event) -> None:
    """300 connections that send a byte of a header now and then."""
    opened = [socket.create_connection((host, port)) for _ in range(300)]
    while not stop.wait(0.1):
        for connection in opened:
            with suppress(OSError):
                connection.send(b"G")
    for connection in opened:
        connection.close()
