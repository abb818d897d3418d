"""The demo: train Gemma 3 270M on the sample data, export, verify, serve, ask one question that training has not seen.

    python -m bench.demo              # under output/, what is up to date is kept
    python -m bench.demo --record     # from nothing, in a folder of its own, and append the row to bench/results/demo.jsonl

wall_s is from the first stage to the served answer. peak_rss_bytes is the largest resident set of any one process on the
way (getrusage of the children that were waited for, and of theirs): the torch workers and the server follow one another.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench import rows

PRESET = "gemma3-270m-cpu"
PORT = 8080
READY_S = 120.0
ANSWER_S = 120.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine itself, whatever proxy the environment names."""


class Failed(Exception):
    """A step ended badly; the process that did it has said why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Shown(NamedTuple):
    question: str
    expected: str
    """What the embedded engine answered greedily when the release was made."""
    answer: str


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="run from nothing and append a row")
    parser.add_argument("--preset", default=PRESET)
    options = parser.parse_args(arguments)
    record: bool = options.record
    output = rows.ROOT / "output" / "bench-demo" if record else rows.ROOT / "output"
    try:
        return run(output, options.preset, record=record)
    except Failed as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.code


def run(output: Path, preset: str, *, record: bool) -> int:
    if record:
        shutil.rmtree(output, ignore_errors=True)
    started = time.monotonic()
    report = train(output, preset, ["--set", f"paths.output={output}", "--set", f"paths.cache={output / 'cache'}"] if record else [])
    shown = serve_and_ask(output / "gguf")
    wall_s = time.monotonic() - started
    print(f"\nasked     {shown.question}\nanswered  {shown.answer}\n\nreport    {report}\nserve it  make serve")
    check(shown)
    if record:
        print(rows.append("demo", "ours", {"preset": preset}, metrics(output / "gguf" / "current", wall_s)))
    return 0


def train(output: Path, preset: str, settings: list[str]) -> Path:
    """The whole way from prepare to report; returns the page. What the trainer says goes to the terminal."""
    command = [sys.executable, "-m", "trainer", "report", "--preset", preset, *settings]
    done = subprocess.run(command, cwd=rows.ROOT, check=False)
    if done.returncode:
        raise Failed("training did not get through; the lines above say why", done.returncode)
    return output / "runs" / preset / "report" / "report.html"


def serve_and_ask(releases: Path) -> Shown:
    """Start the gateway, put the release's first probe to /chat, stop the gateway."""
    probe = first_probe(releases / "current" / "probes.jsonl")
    with server(releases) as address:
        reply = post(f"{address}/chat", {"messages": probe["messages"], "temperature": 0})
    return Shown(probe["messages"][-1]["content"], probe["answer"], reply["message"]["content"])


def first_probe(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8").partition("\n")[0])


def check(shown: Shown) -> None:
    """Greedy answers of one engine on one machine are one answer. Raises Failed."""
    if shown.answer != shown.expected:
        raise Failed(f"the server answers {shown.answer!r}, the release was made with {shown.expected!r}", 1)


@contextmanager
def server(releases: Path) -> Iterator[str]:
    """A running gateway's address; it is ready, and gone afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--releases", str(releases), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    log = releases.parent / "demo-server.log"
    with log.open("w", encoding="utf-8") as lines, subprocess.Popen(command, cwd=rows.ROOT, stderr=lines) as process:
        try:
            wait_until_ready(process, address)
            yield address
        except Failed as error:
            raise Failed(f"{error} ({log} has what the server said)", error.code) from error
        finally:
            process.terminate()


def free_port() -> int:
    """8080, or any other where that is taken."""
    for port in (PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            return number
    raise Failed("no free port on 127.0.0.1", 1)


def wait_until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + READY_S
    said: dict[str, str] = {"message": "it does not answer"}
    while time.monotonic() < deadline and said.get("code") != "release_refused":
        if process.poll() is not None:
            raise Failed("the server stopped before it was ready", process.returncode or 1)
        try:
            with DIRECT.open(f"{address}/readyz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            said = json.load(error)["error"]
        except OSError:
            pass
        time.sleep(0.5)
    raise Failed(f"the server is not ready: {said['message']}", 1)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=ANSWER_S) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise Failed(f"/chat answers {error.code}: {error.read().decode(errors='replace')}", 1) from error
    except OSError as error:
        raise Failed(f"/chat does not answer: {error}", 1) from error


def metrics(release: Path, wall_s: float) -> dict[str, float | None]:
    scores = json.loads((release / "manifest.json").read_text(encoding="utf-8"))["scores"]
    return {
        "wall_s": round(wall_s, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        **{name: scores[name] for name in ("exact_match_base", "exact_match_tuned", "exact_match_served", "num_records")},
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
