"""Clients that keep asking while releases come and go: every answer is whole, or a failed request."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from bench import rows
from tests.server.real import GatewayProcess, base_release, clean_environment, probe, write_release

TOKENS = 12
TOKENS_AT_MOST = {"max_tokens": TOKENS, "temperature": 0}
PROMPT = "The capital of France is"


class Asked(NamedTuple):
    """model: who answered; empty: nobody, and `problem` says why."""

    model: str
    problem: str
    wall_s: float


def releases_of(folder: Path, names: Sequence[str]) -> list[Path]:
    """The untrained 270M under several names, each with a GGUF of its own: zeros at the end make other bytes of the same model."""
    base = base_release(folder / f"{names[0]}-0123456789ab")
    prompt = base.manifest.prompt
    settings = {"stop": list(prompt.stop), "num_ctx": prompt.num_ctx, "sampling": prompt.sampling.model_dump()}
    probes = [probe(item.conversation, item.prompt_ids, item.answer) for item in base.probes]
    made = [base.directory]
    for number, name in enumerate(names[1:], start=1):
        directory = folder / f"{name}-0123456789ab"
        directory.mkdir()
        (directory / "model.gguf").write_bytes(base.gguf.read_bytes() + bytes(32 * number))
        made.append(write_release(directory, probes, **settings))
    return made


def command(words: Sequence[str], flags: Sequence[str]) -> None:
    """`python -m server release ...`, as a person runs it."""
    subprocess.run([sys.executable, "-m", "server", "release", *words, *flags], cwd=rows.ROOT, check=True, env=clean_environment())


def measure(directories: Sequence[Path], flags: Sequence[str], clients: int, seconds: float) -> dict[str, Any]:
    """Load the first release; while `clients` keep asking for `seconds`, load the others and go back once, at equal distances.

    flags: engine, state directory and the like, for gateway and loader alike.
    """
    command(["load", str(directories[0])], flags)
    process = GatewayProcess(*flags, "--waiting", str(2 * clients))
    try:
        process.wait_ready()
        changes = [*(["load", str(directory)] for directory in directories[1:]), ["rollback"]]
        asked = asyncio.run(_asking(process.url, clients, seconds, [partial(command, words, flags) for words in changes]))
        live = _settled(process, directories[-2].name)
    finally:
        process.stop()
    return {**summary(asked), "switches": len(changes), "model_at_the_end": live}


def _settled(process: GatewayProcess, expected: str, timeout_s: float = 60.0) -> str:
    """The model that is served, once it is the expected release: a gateway sees a change at its next look."""
    deadline = time.monotonic() + timeout_s
    while True:
        model: str = process.wait_ready()["model"]
        if model.endswith(f":{expected}") or time.monotonic() > deadline:
            return model
        time.sleep(0.2)


def summary(asked: Sequence[Asked]) -> dict[str, Any]:
    failed = [one for one in asked if one.problem]
    walls = sorted(one.wall_s for one in asked)
    return {
        "requests": len(asked),
        "failed_requests": len(failed),
        "problems": dict(Counter(one.problem for one in failed)),
        "answers": dict(Counter(one.model for one in asked if not one.problem)),
        "wall_p50_s": walls[len(walls) // 2],
        "wall_max_s": walls[-1],
    }


async def _asking(url: str, clients: int, seconds: float, changes: Sequence[Callable[[], None]]) -> list[Asked]:
    """Clients ask until the last change is over, and between two changes each of them was answered twice at least."""
    began, asked, enough = time.monotonic(), list[Asked](), asyncio.Event()
    asking = [asyncio.create_task(_client(url, number, asked, enough)) for number in range(clients)]
    for number, change in enumerate([*changes, None], start=1):
        heard = len(asked) + 2 * clients
        while len(asked) < heard or time.monotonic() < began + seconds * number / (len(changes) + 1):  # noqa: ASYNC110  # answers and a clock
            await asyncio.sleep(0.05)
        if change:
            await asyncio.to_thread(change)
    enough.set()
    await asyncio.gather(*asking)
    return asked


async def _client(url: str, number: int, asked: list[Asked], enough: asyncio.Event) -> None:
    """One client, once at least; even ones stream. No retries: whatever is not a whole answer counts."""
    ask: Callable[[httpx2.AsyncClient], Awaitable[Asked]] = _streamed if number % 2 == 0 else _whole
    async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        while True:
            began = time.monotonic()
            try:
                one = await ask(client)
            except httpx2.HTTPError as error:
                one = Asked("", type(error).__name__, 0.0)
            asked.append(one._replace(wall_s=time.monotonic() - began))
            if enough.is_set():
                return


async def _whole(client: httpx2.AsyncClient) -> Asked:
    reply = await client.post("/chat", json={"message": PROMPT, **TOKENS_AT_MOST})
    tree = reply.json()
    if reply.status_code != 200:
        return Asked("", f"{reply.status_code} {tree['error']['message']}", 0.0)
    return Asked(tree["model"], "" if tree["message"]["content"] else "an empty answer", 0.0)


async def _streamed(client: httpx2.AsyncClient) -> Asked:
    reply = await client.post("/chat", json={"message": PROMPT, "stream": True, **TOKENS_AT_MOST})
    if reply.status_code != 200:
        return Asked("", f"{reply.status_code} {reply.json()['error']['message']}", 0.0)
    data = [block.removeprefix("data: ") for block in reply.text.split("\n\n") if block.startswith("data: ")]
    if data[-1:] != ["[DONE]"]:
        return Asked("", f"a stream that ends in {data[-1:]}", 0.0)
    events = [json.loads(item) for item in data[:-1]]
    whole = bool(events[-1].get("finish_reason")) and any(event["delta"].get("content") for event in events)
    return Asked(events[-1]["model"], "" if whole else "an empty answer", 0.0)
