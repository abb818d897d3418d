"""What the gateway costs: first tokens and tokens per second beside a direct line to the engine, and how many events a core relays.

    python -m bench.gateway --case added      # real Ollama (TRINITY_OLLAMA or PATH) with the untrained 270M
    python -m bench.gateway --case fixed      # a fake engine whose first token takes 20 ms
    python -m bench.gateway --case relay      # a fake engine without a clock, beside nginx as a plain proxy
    python -m bench.gateway --case streams    # 2,000 answers at the same time, for --seconds
    python -m bench.gateway --case release_switch --seconds 300    # 8 clients, 3 releases, 1 rollback; --engine ollama or embedded

added, fixed: rounds of the same question, directly, through the gateway and through a relay on FastAPI that does nothing else
(bench.bare_relay), in random order, over connections that stay open; added_ttft is the percentile of through minus direct, round by
round. relative_tokens_per_s: through over direct, the medians of rounds in turns, the bare relay among them. --engine-threads 1 leaves
llama.cpp a core of its own on a machine of two: its threads wait for each other at every layer, and whoever takes a core from one stops both.
relay: events_per_cpu_s divides by the processor time of the gateway's, or nginx's, processes. streams: lost_streams are those with a
token too few or out of order; memory is the gateway's resident set after a tenth of the time and at the end. release_switch:
failed_requests are all that were not answered whole; nobody tries again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fastapi

from bench import rows, switching
from bench.fake_ollama import MAX_CLIENTS
from bench.streams import Client, Dialect, Seen
from server.port import allow_connections
from tests.server.real import GatewayProcess, base_release, clean_environment, free_port, ollama, ollama_binary
from tests.server.scripted import small_release

FIXED_S = 0.02
"""First token of the fake engine in case fixed."""
T = TypeVar("T")
PROMPT = "The capital of France is"
LONG = "a b c d e f g " * 20
"""What the untrained model goes on with for about a hundred tokens; it answers PROMPT with six, where a first token is a quarter of the time."""
ANSWER_TOKENS = 128
"""At most, of an answer to LONG."""
BARE = f"bare relay, fastapi {fastapi.__version__}"


class Way(NamedTuple):
    """A way to an engine: directly, through the gateway, or through nginx."""

    url: str
    dialect: Dialect
    model: str = ""

    def client(self) -> Client:
        return Client(self.url, self.dialect, self.model)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--clients", type=int, default=None, help="of cases streams (2000) and release_switch (8)")
    parser.add_argument("--seconds", type=float, default=600.0, help="of cases streams and release_switch")
    parser.add_argument("--engine-threads", type=int, default=0, help="of case added: llama.cpp's; 0 leaves them to Ollama")
    parser.add_argument("--engine", choices=("ollama", "embedded"), default="ollama", help="of case release_switch")
    parser.add_argument("--out", type=Path, default=None, help="file to append to, instead of the one in bench/results/")
    options = parser.parse_args(arguments)
    allow_connections(MAX_CLIENTS)
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        for who, work, metrics in CASES[options.case](options, folder, undo):
            row = rows.append("gateway", who, {"case": options.case, **work}, metrics, options.out)
            print(json.dumps({name: row[name] for name in ("who", "work", "metrics")}), flush=True)
    return 0


Measured = Iterator[tuple[str, dict[str, Any], dict[str, Any]]]


def added(options: argparse.Namespace, folder: Path, undo: ExitStack) -> Measured:
    release = base_release(folder / "gguf" / "base-0123456789ab")
    threads: int = options.engine_threads
    url = real_ollama(folder / "home", undo, {"LLAMA_ARG_THREADS": str(threads)} if threads else {})
    gateway = undo.enter_context(gateway_of(url, folder / "gguf" / "base-0123456789ab", folder, slots=4))
    direct = Way(url, "ollama", release.model)
    bare = Way(undo.enter_context(serving("bench.bare_relay", "--engine-url", url)), "ollama", release.model)
    work = {"engine": "ollama", "engine_threads": threads or None}
    yield from each(direct, (gateway.way, bare), work, options.pairs, 1)
    for clients in (1, 4):
        yield from throughput(direct, (gateway.way, bare), {**work, "clients": clients})


def fixed(options: argparse.Namespace, folder: Path, undo: ExitStack) -> Measured:
    url = undo.enter_context(serving("bench.fake_ollama", "--first-s", str(FIXED_S)))
    gateway = undo.enter_context(gateway_of(url, fake_release(folder), folder, slots=4))
    direct = Way(url, "ollama", gateway.model)
    bare = Way(undo.enter_context(serving("bench.bare_relay", "--engine-url", url)), "ollama", gateway.model)
    yield from each(direct, (gateway.way, bare), {"engine": "fake"}, options.pairs, 4)


def relay(options: argparse.Namespace, folder: Path, undo: ExitStack) -> Measured:
    url = undo.enter_context(serving("bench.fake_ollama"))
    gateway = undo.enter_context(gateway_of(url, fake_release(folder), folder, slots=64))
    proxy = undo.enter_context(nginx(url, folder))
    ways = (("ours", gateway.way, [gateway.pid]), (nginx_version(), Way(proxy.url, "ollama", gateway.model), proxy.pids))
    for clients in (1, 32):
        found: dict[str, list[dict[str, float]]] = {who: [] for who, _, _ in ways}
        for _ in range(4):  # the first round warms up
            for who, way, pids in ways:
                found[who].append(asyncio.run(rush(way, clients, 32_000 // clients, pids)))
        for who, rounds in found.items():
            yield (
                who,
                {"engine": "fake", "clients": clients},
                {name: statistics.median(one[name] for one in rounds[1:]) for name in rounds[0]},
            )


def streams(options: argparse.Namespace, folder: Path, undo: ExitStack) -> Measured:
    gap_s, clients = 1.0, options.clients or 2000
    url = undo.enter_context(serving("bench.fake_ollama", "--gap-s", str(gap_s)))
    gateway = undo.enter_context(gateway_of(url, fake_release(folder), folder, slots=clients))
    metrics = asyncio.run(crowd(gateway, clients, round(options.seconds / gap_s), options.seconds))
    yield "ours", {"engine": "fake", "clients": clients, "seconds": options.seconds}, metrics


def release_switch(options: argparse.Namespace, folder: Path, undo: ExitStack) -> Measured:
    clients = options.clients or 8
    flags = ["--engine", options.engine, "--state", str(folder / "state"), "--releases", str(folder / "gguf")]
    if options.engine == "ollama":
        flags += ["--ollama-url", real_ollama(folder / "home", undo), "--ollama-models", str(folder / "home" / "models")]
    directories = switching.releases_of(folder / "gguf", ("first", "second", "third"))
    work = {"engine": options.engine, "clients": clients, "seconds": options.seconds, "releases": 3, "rollbacks": 1}
    yield "ours", work, switching.measure(directories, flags, clients, options.seconds)


CASES: dict[str, Callable[[argparse.Namespace, Path, ExitStack], Measured]] = {
    "added": added,
    "fixed": fixed,
    "relay": relay,
    "streams": streams,
    "release_switch": release_switch,
}


def each(direct: Way, through: tuple[Way, Way], work: dict[str, Any], num: int, tokens: int) -> Measured:
    """A row for the gateway, and one for the bare relay: what is left of the difference when nothing is done."""
    seen = asyncio.run(pairs(direct, through, num, tokens))
    for who, metrics in zip(("ours", BARE), seen, strict=True):
        yield who, {**work, "clients": 1, "pairs": num}, metrics


async def pairs(direct: Way, through: Sequence[Way], num: int, tokens: int) -> list[dict[str, Any]]:
    """Rounds of one question each way, in another order each time; the first 20 warm up."""
    clients = [way.client() for way in (direct, *through)]
    found: list[list[float]] = [[] for _ in clients]
    for _ in range(num + 20):
        for which in random.sample(range(len(clients)), len(clients)):
            seen = await clients[which].ask(PROMPT, tokens)
            if not seen.ended or not seen.tokens:
                raise SystemExit(f"bench.gateway: an answer came to no end: {seen}")
            found[which].append(seen.first_s)
    for client in clients:
        await client.close()
    engine = found[0][20:]
    metrics = []
    for way in found[1:]:
        at = statistics.quantiles([through_s - direct_s for direct_s, through_s in zip(engine, way[20:], strict=True)], n=100)
        metrics.append({"added_ttft_p50_s": at[49], "added_ttft_p99_s": at[98], "direct_ttft_p50_s": statistics.median(engine)})
    return metrics


def throughput(direct: Way, through: tuple[Way, Way], work: dict[str, Any], rounds: int = 3) -> Measured:
    """Long answers, one a client and round. The rounds of the ways alternate, the first of each warms up."""
    found: list[list[tuple[float, float]]] = [[], [], []]
    for _ in range(rounds + 1):
        for speeds, way in zip(found, (direct, *through), strict=True):
            speeds.append(asyncio.run(tokens_per_s(way, work["clients"])))
    engine, *others = (statistics.median(speed for speed, _ in speeds[1:]) for speeds in found)
    lengths = [statistics.median(length for _, length in speeds[1:]) for speeds in found]
    for who, speed, length in zip(("ours", BARE), others, lengths[1:], strict=True):
        metrics = {"tokens_per_s": speed, "direct_tokens_per_s": engine, "relative_tokens_per_s": speed / engine}
        yield who, work, {**metrics, "answer_tokens": length, "direct_answer_tokens": lengths[0]}


async def tokens_per_s(way: Way, clients: int) -> tuple[float, float]:
    """Of all clients together, and the tokens of an answer."""
    start = time.perf_counter()
    seen = await _together(way, clients, lambda client: client.ask(LONG, ANSWER_TOKENS))
    total = sum(one.tokens for one in seen)
    return total / (time.perf_counter() - start), total / clients


async def rush(way: Way, clients: int, tokens: int, pids: Sequence[int]) -> dict[str, float]:
    before, start = cpu_s(pids), time.perf_counter()
    seen = await _together(way, clients, lambda client: client.ask(PROMPT, tokens))
    wall_s, used_s = time.perf_counter() - start, cpu_s(pids) - before
    total = sum(one.tokens for one in seen)
    return {
        "events_per_s": total / wall_s,
        "events_per_cpu_s": total / used_s,
        "lost_streams": sum(not _whole(one, tokens) for one in seen),
    }


async def crowd(gateway: Gateway, clients: int, tokens: int, seconds: float) -> dict[str, Any]:
    before = cpu_s([gateway.pid])
    everything = asyncio.create_task(_together(gateway.way, clients, lambda client: client.ask(PROMPT, tokens)))
    await asyncio.sleep(max(5.0, seconds / 10))
    early = resident_bytes(gateway.pid)
    await asyncio.sleep(max(0.0, seconds * 0.8))
    late = resident_bytes(gateway.pid)
    seen = await everything
    total = sum(one.tokens for one in seen)
    return {
        "lost_streams": sum(not _whole(one, tokens) for one in seen),
        "events": total,
        "events_per_cpu_s": total / (cpu_s([gateway.pid]) - before),
        "early_rss_bytes": early,
        "late_rss_bytes": late,
    }


def _whole(seen: Seen, tokens: int) -> bool:
    return seen.in_order and seen.ended and seen.tokens == tokens


async def _together(way: Way, clients: int, work: Callable[[Client], Awaitable[T]]) -> list[T]:
    made = [way.client() for _ in range(clients)]
    try:
        return list(await asyncio.gather(*(work(client) for client in made)))
    finally:
        await asyncio.gather(*(client.close() for client in made))


class Gateway(NamedTuple):
    way: Way
    pid: int
    model: str


@contextmanager
def gateway_of(engine_url: str, release: Path, folder: Path, slots: int) -> Iterator[Gateway]:
    flags = ["--engine", "ollama", "--ollama-url", engine_url, "--releases", str(release), "--state", str(folder / "state")]
    process = GatewayProcess(*flags, "--slots", str(slots), "--waiting", "64", "--max-answer-tokens", "1000000")
    try:
        model = process.wait_ready()["model"]
        yield Gateway(Way(process.url, "gateway"), process.process.pid, model)
    finally:
        process.stop()


def real_ollama(home: Path, undo: ExitStack, more: Mapping[str, str] | None = None) -> str:
    if ollama_binary() is None:
        raise SystemExit("bench.gateway: no Ollama: put one on PATH or name it in TRINITY_OLLAMA")
    return undo.enter_context(ollama(home, more)).url


def fake_release(folder: Path) -> Path:
    """What the fake engine is asked to serve: no GGUF, and a context without an end."""
    short = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "num_predict": 2}  # a probe's answer, which may take a second a token
    return small_release(folder / "gguf", num_ctx=1_000_000, sampling=short)


@contextmanager
def serving(module: str, *flags: str) -> Iterator[str]:
    """The address of a bench's own server, which prints its port."""
    command = [sys.executable, "-m", module, *flags]
    process = subprocess.Popen(command, cwd=rows.ROOT, stdout=subprocess.PIPE, text=True, env=clean_environment())
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


class Proxy(NamedTuple):
    url: str
    pids: list[int]


@contextmanager
def nginx(upstream: str, folder: Path) -> Iterator[Proxy]:
    """One worker, unbuffered, connections to the engine kept."""
    port, home = free_port(), folder / "nginx"
    home.mkdir()
    (home / "nginx.conf").write_text(NGINX.format(home=home, port=port, upstream=upstream.removeprefix("http://")))
    process = subprocess.Popen(
        [nginx_binary(), "-c", str(home / "nginx.conf"), "-p", str(home), "-g", "daemon off;"], stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(0.5)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
        yield Proxy(f"http://127.0.0.1:{port}", [process.pid, *map(int, children)])
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait()


NGINX = """
worker_processes 1; pid {home}/pid; error_log {home}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u; scgi_temp_path {home}/s;
  upstream engine {{ server {upstream}; keepalive 64; }}
  server {{ listen 127.0.0.1:{port}; location / {{
    proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 1h;
  }} }}
}}
"""


def nginx_binary() -> str:
    """Debian keeps it where only root's PATH looks."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        raise SystemExit("bench.gateway: no nginx to compare with: install the package nginx-light")
    return binary


def nginx_version() -> str:
    said = subprocess.run([nginx_binary(), "-v"], capture_output=True, text=True, check=True).stderr
    return "nginx " + said.strip().rpartition("/")[2].split()[0]


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time so far."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
