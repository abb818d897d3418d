"""A gateway over a real Ollama that is killed, frozen and reloaded at random moments, while clients of every kind go on asking.

The case gateway_chaos of bench.soak. Every outcome is one of five (bench.outcomes), none may be unaccounted; and afterwards the gateway
must answer, hold no slot and no queue, have grown by little, and have left no process behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2

from bench import rows, switching
from bench.crowd import LETTERS, Crowd, asked, connections, plain, streaming, whole
from bench.gateway import resident_bytes
from bench.outcomes import KINDS, Question
from tests.server.real import GatewayProcess, OllamaProcess, clean_environment, lives, ollama_binary

CASE = "gateway_chaos"
CLIENTS = 8
WAITING = 6
"""Places in the queue: fewer than there are clients, so that it overflows now and then by itself."""
TIMEOUTS_S = {"queue": 15, "first-token": 20, "stall": 8, "total": 30}
"""Short, so that a frozen engine meets them."""
RECOVER_S = 90.0
"""From the last trouble to an answer: what is under way may take its time-outs, and the model must be read again."""
PATIENCE_S = 20.0
LONG_S = 300.0
CALM = 40
"""Questions once the engine is back, four at a time, every one of which must be answered."""
GROWTH_BYTES = 32 << 20
BROKEN_OFF = ("in the reply", "just ends")
BUGS = re.compile(r"Traceback|a bug:|never retrieved|made a mistake|was destroyed|Unclosed")


Counts = dict[str, int]


@dataclass(frozen=True)
class Tally:
    """Counts of all calls together; the last three are those of the last one."""

    seconds: float = 0.0
    sent: int = 0
    outcomes: Counts = field(default_factory=dict)
    whys: Counts = field(default_factory=dict)
    events: Counts = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    recovered_s: float = 0.0
    rss_early_bytes: int = 0
    rss_end_bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return replace(
            other,
            seconds=self.seconds + other.seconds,
            sent=self.sent + other.sent,
            outcomes=_sum(self.outcomes, other.outcomes),
            whys=_sum(self.whys, other.whys),
            events=_sum(self.events, other.events),
            problems=[*self.problems, *other.problems],
        )

    def failures(self, at_least: int) -> list[str]:
        """Why this is no proof; nothing when it is one."""
        kinds = Counter(self.outcomes)
        found = list(self.problems)
        if kinds["unaccounted"]:
            found.append(f"{kinds['unaccounted']} unaccounted")
        if sum(kinds.values()) != self.sent:
            found.append(f"{sum(kinds.values())} outcomes of {self.sent} requests")
        if kinds["answered"] < max(1, at_least):
            found.append(f"{kinds['answered']} answered")
        return found


def _sum(one: Counts, other: Counts) -> Counts:
    return dict(Counter(one) + Counter(other))


def read(path: Path) -> Tally:
    return Tally(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else Tally()


def line(tally: Tally) -> str:
    parts = " + ".join(f"{tally.outcomes.get(kind, 0)} {kind}" for kind in KINDS)
    return (
        f"{CASE}: {tally.seconds:.0f} s, {tally.sent} sent = {parts}; "
        f"gateway {tally.rss_early_bytes / 2**20:.0f} -> {tally.rss_end_bytes / 2**20:.0f} MiB, back after {tally.recovered_s:.1f} s"
    )


def metrics(tally: Tally) -> dict[str, Any]:
    """A row's. lost: outcomes that fit nowhere; torn: those of them that broke off in the middle; failed: what was wrong at a call's end."""
    kinds: Counts = {kind: tally.outcomes.get(kind, 0) for kind in KINDS}
    return {
        "trials": tally.sent,
        "lost": kinds["unaccounted"],
        "torn": sum(number for why, number in tally.whys.items() if why.startswith("unaccounted") and why.endswith(BROKEN_OFF)),
        "failed": len(tally.problems),
        **kinds,
        "whys": tally.whys,
        "events": tally.events,
        "recovered_s": tally.recovered_s,
        "rss_early_bytes": tally.rss_early_bytes,
        "rss_end_bytes": tally.rss_end_bytes,
    }


def run(folder: Path, seconds: float, seed: int, log: Path) -> Tally:
    """`seconds` of it. folder: for releases, Ollama's models and state, 1 GB. log: what the gateway said."""
    binary = ollama_binary()
    if binary is None:
        raise SystemExit(f"bench.soak --case {CASE}: no Ollama in PATH: name its binary in TRINITY_OLLAMA")
    releases = switching.releases_of(folder / "gguf", ("first", "second"))
    (folder / "home").mkdir()
    engine = OllamaProcess(binary, folder / "home", _port())
    try:
        flags = ["--engine", "ollama", "--ollama-url", engine.url, "--ollama-models", str(folder / "home" / "models")]
        flags += ["--state", str(folder / "state"), "--releases", str(folder / "gguf")]
        switching.command(["load", str(releases[0])], flags)
        limits = [word for name, value in TIMEOUTS_S.items() for word in (f"--{name}-timeout-s", str(value))]
        gateway = GatewayProcess(*flags, *limits, "--waiting", str(WAITING))
        try:
            gateway.wait_ready()
            tally = asyncio.run(_measure(gateway, engine, Trouble(engine, releases, flags, random.Random(seed)), seconds, seed))
        finally:
            code = gateway.stop()
            log.write_text("\n".join(gateway.lines), encoding="utf-8")
    finally:
        engine.stop()
    problems = [f"the gateway's log: {said}" for said in gateway.lines if BUGS.search(said)][:10]
    if code not in (0, -signal.SIGTERM):
        problems.append(f"the gateway ended with {code}")
    if left := [pid for pid in (gateway.process.pid, engine.process.pid, *engine.runners()) if lives(pid)]:
        problems.append(f"processes that outlived their end: {left}")
    return replace(tally, problems=[*tally.problems, *problems])


def _port() -> int:
    """Below those that outgoing connections get: else one of them may take Ollama's while it is down, or be connected to itself."""
    for port in random.sample(range(20_000, 32_000), 50):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("bench.soak: no free port below 32000")


async def _measure(gateway: GatewayProcess, engine: OllamaProcess, trouble: Trouble, seconds: float, seed: int) -> Tally:
    async with connections(gateway.url) as http:
        crowd, enough, began = Crowd(http, 4 * WAITING), asyncio.Event(), time.monotonic()
        asking = [asyncio.create_task(crowd.client(number, random.Random(f"{seed} {number}"), enough)) for number in range(CLIENTS)]
        early = asyncio.create_task(_rss_after(gateway.process.pid, seconds / 10))
        await trouble.make(began + seconds, crowd)
        calm = time.monotonic()
        enough.set()
        await asyncio.gather(*asking)
        problems = [*trouble.problems, *await _back(http, calm + RECOVER_S)]
        recovered_s = time.monotonic() - calm
        problems += trouble.too_little(seconds) + await _calm(http, random.Random(seed))
        problems += await _at_rest(http, gateway, engine)
    rss = (await early, resident_bytes(gateway.process.pid))
    if rss[1] - rss[0] > GROWTH_BYTES:
        problems.append(f"the gateway grew from {rss[0]} to {rss[1]} bytes")
    counts = dict(crowd.outcomes), dict(crowd.whys), dict(trouble.events)
    return Tally(time.monotonic() - began, crowd.sent, *counts, problems, recovered_s, *rss)


async def _rss_after(pid: int, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return resident_bytes(pid)


async def _back(http: httpx2.AsyncClient, until: float) -> list[str]:
    """Ask until an answer is whole."""
    question = Question("/chat", {"message": LETTERS, "temperature": 0, "max_tokens": 24}, LETTERS, stops=True)
    while True:
        outcome = await asked(http, question, whole)
        if outcome.kind == "answered":
            return []
        if time.monotonic() > until:
            return [f"no answer {RECOVER_S:g} s after the last trouble: {outcome.why}"]
        await asyncio.sleep(0.2)


async def _calm(http: httpx2.AsyncClient, dice: random.Random) -> list[str]:
    """With the engine well and nobody else there, whatever the troubles left behind in the gateway would show."""
    places = asyncio.Semaphore(4)

    async def one(number: int) -> str:
        async with places:
            outcome = await (streaming if number % 2 else plain)(http, dice)
            return "" if outcome.kind == "answered" else f"in the calm afterwards: {outcome.kind}, {outcome.why}"

    return [said for said in await asyncio.gather(*(one(number) for number in range(CALM))) if said][:10]


async def _at_rest(http: httpx2.AsyncClient, gateway: GatewayProcess, engine: OllamaProcess, timeout_s: float = 15.0) -> list[str]:
    """Nothing may be held once nobody asks: slots, queue, requests (but for this look's own), processes."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = (await http.get("/metrics", timeout=10)).text
        found = {
            "slots taken": _sample(text, "answers_in_flight"),
            "requests in the queue": _sample(text, "queue_length"),
            "requests in flight": _sample(text, "requests_in_flight") - 1,
            "children of the gateway": len(_children(gateway.process.pid)),
            "llama-servers too many": max(0, len(engine.runners()) - 1),
        }
        problems = [f"{count:g} {name} at the end" for name, count in found.items() if count]
        if not problems or time.monotonic() > deadline:
            return problems
        await asyncio.sleep(0.2)


def _sample(text: str, name: str) -> float:
    found = re.search(rf"^trinity_{name} (\S+)$", text, re.MULTILINE)
    assert found, f"/metrics names no trinity_{name}"
    return float(found[1])


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def _signalled(pid: int, how: signal.Signals) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, how)
        return True
    return False


class Trouble:
    """Whatever happens to an engine. After each event a live Ollama is there again, as a supervisor would see to."""

    def __init__(self, engine: OllamaProcess, releases: Sequence[Path], flags: Sequence[str], dice: random.Random) -> None:
        self.events: Counter[str] = Counter()
        self.problems: list[str] = []
        self._engine, self._releases, self._flags, self._dice = engine, releases, flags, dice
        self._loading: asyncio.Task[None] | None = None

    async def make(self, until: float, crowd: Crowd) -> None:
        """One event after the other with a pause between them, while loaders do their work beside them."""
        kinds: dict[str, Callable[[], Awaitable[bool]]] = {
            "kill_runner": self._kill_runner,
            "kill_ollama": lambda: self._restart(signal.SIGKILL),
            "stop_ollama": lambda: self._restart(signal.SIGTERM),
            "freeze_ollama": lambda: self._freeze([self._engine.process.pid]),
            "freeze_runner": lambda: self._freeze(self._engine.runners()),
            "switch": self._switch,
            "flood": lambda: self._flood(crowd),
        }
        bag: list[str] = []
        began = time.monotonic()
        while (left_s := until - time.monotonic()) > 0:
            await self._pause(left_s, crowd)
            bag = bag or self._dice.sample([*kinds, "switch", "kill_runner"], len(kinds) + 2)  # each of them early on
            kind = bag.pop()
            print(f"{CASE}: {time.monotonic() - began:5.0f} s, {crowd.outcomes['answered']} of {crowd.sent} answered: {kind}", flush=True)
            self.events[kind] += bool(await kinds[kind]())
        if self._loading:
            await self._loading

    def too_little(self, seconds: float) -> list[str]:
        """A long run proves nothing about what never happened in it."""
        wanted = ("kill_runner", "kill_ollama", "stop_ollama", "freeze_ollama", "freeze_runner", "switch", "flood", "loader_done")
        return [f"no {kind} in {seconds:.0f} s" for kind in wanted if seconds >= LONG_S and not self.events[kind]]

    async def _pause(self, left_s: float, crowd: Crowd) -> None:
        """Half of them end before the engine may have come back from the last event; the others let it answer first, within reason."""
        until, heard = time.monotonic() + left_s, crowd.outcomes["answered"] + 2
        await asyncio.sleep(min(left_s, self._dice.uniform(0.5, 8)))
        if self._dice.random() < 0.5:
            until = min(until, time.monotonic() + PATIENCE_S)
            while crowd.outcomes["answered"] < heard and time.monotonic() < until:  # noqa: ASYNC110  # answers and a clock
                await asyncio.sleep(0.05)

    # each says whether anything happened

    async def _flood(self, crowd: Crowd) -> bool:
        await crowd.flood(self._dice)
        return True

    async def _kill_runner(self) -> bool:
        return bool([pid for pid in self._engine.runners() if _signalled(pid, signal.SIGKILL)])

    async def _restart(self, how: signal.Signals) -> bool:
        await asyncio.to_thread(self._engine.stop, how)
        await asyncio.sleep(self._dice.uniform(0, 3))
        await asyncio.to_thread(self._engine.start)
        return True

    async def _freeze(self, pids: Sequence[int]) -> bool:
        frozen = [pid for pid in pids if _signalled(pid, signal.SIGSTOP)]
        await asyncio.sleep(self._dice.uniform(1, 12) if frozen else 0)
        for pid in frozen:
            _signalled(pid, signal.SIGCONT)
        return bool(frozen)

    async def _switch(self) -> bool:
        """A loader as a person starts it; one in four is killed at its work. While one is there no other is started."""
        if self._loading and not self._loading.done():
            return False
        kill_after_s = self._dice.uniform(0.5, 3) if self._dice.random() < 0.25 else None
        release = self._releases[self.events["switch"] % len(self._releases)]
        self._loading = asyncio.create_task(self._load(release, kill_after_s))
        return True

    async def _load(self, release: Path, kill_after_s: float | None) -> None:
        command = [sys.executable, "-m", "server", "release", "load", str(release), *self._flags]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, cwd=rows.ROOT, env=clean_environment(), stdout=pipe, stderr=asyncio.subprocess.STDOUT
        )
        speaking = asyncio.create_task(process.communicate())
        done, _ = await asyncio.wait({speaking}, timeout=180 if kill_after_s is None else kill_after_s)
        if not done:
            process.kill()
        said = (await speaking)[0].decode("utf-8", "replace")
        if done and process.returncode not in (0, 2):
            self.problems.append(f"a loader's exit code {process.returncode}: {said[-300:]}")
        elif not done and kill_after_s is None:
            self.problems.append(f"a loader that does not end: {said[-300:]}")
        how = "killed" if not done else "done" if process.returncode == 0 else "failed"
        self.events[f"loader_{how}"] += 1
