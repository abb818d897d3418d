"""What becomes of requests when the server is asked to stop, told by a real process' clients and by an application's."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx2
import pytest

from server.app import create_app
from server.chat import Delta, Finish, Usage
from server.port import Server, listen, make_server
from server.settings import Settings
from tests.server.scripted import ScriptedEngine, small_release, sse, until

pytestmark = pytest.mark.anyio
HI = {"message": "Hi"}
SLOW = (Delta("a"), 1.0, Delta("b"), Finish("stop", Usage(1, 2)))


class Draining:
    """A server that was asked to stop while answers were under way; requests of every kind are sent to it meanwhile."""

    def __init__(self, releases: Path, engine: ScriptedEngine, drain_s: float) -> None:
        settings = Settings(releases=releases, state=releases / "state", drain_s=drain_s, slots=engine.slots)
        self.engine = engine
        self.server: Server = make_server(create_app(settings, engine), settings)
        self.listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def run(self) -> dict[str, httpx2.Response]:
        """Replies by what was asked: two under way, one waiting; the rest comes while the server drains."""
        running = asyncio.create_task(self.server.serve(sockets=[self.listener]))
        await until(lambda: self.server.started and bool(self.engine.loaded))
        async with httpx2.AsyncClient(base_url=self.url, timeout=20, trust_env=False) as client:
            asked = {"stream": asyncio.create_task(client.post("/chat", json={**HI, "stream": True}))}
            asked["whole"] = asyncio.create_task(client.post("/chat", json=HI))
            await until(lambda: self.engine.running == 2)
            asked["waiting"] = asyncio.create_task(client.post("/chat", json=HI))
            await asyncio.sleep(0.1)
            self.server.should_exit = True
            await asyncio.sleep(0.2)
            replies = {
                "ready": await client.get("/readyz"),
                "health": await client.get("/healthz"),
                "new": await client.post("/chat", json=HI),
            }
            self.seconds = time.monotonic()
            replies |= {name: await task for name, task in asked.items()}
            await asyncio.wait_for(running, 20)
            self.seconds = time.monotonic() - self.seconds
        return replies


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path)
    return tmp_path


async def test_answers_under_way_end_well_and_everything_else_is_sent_elsewhere(releases: Path) -> None:
    engine = ScriptedEngine(SLOW, slots=2)
    replies = await Draining(releases, engine, drain_s=20).run()
    assert replies["whole"].json()["message"]["content"] == "ab"
    assert sse(replies["stream"].text)[-1] == "[DONE]"
    for name in ("ready", "waiting", "new"):
        assert (replies[name].status_code, replies[name].headers["retry-after"]) == (503, "5"), name
        assert replies[name].json()["error"]["code"] == "draining"
    assert replies["health"].status_code == 200
    assert (engine.running, engine.cancelled) == (0, 0)


async def test_an_answer_that_outlasts_the_drain_ends_with_a_typed_error_never_in_silence(releases: Path) -> None:
    engine = ScriptedEngine([Delta("a"), 60.0, *SLOW], slots=2)
    draining = Draining(releases, engine, drain_s=0.5)
    replies = await draining.run()
    assert (replies["whole"].status_code, replies["whole"].json()["error"]["code"]) == (503, "draining")
    *_, last = sse(replies["stream"].text)
    assert (last["error"]["code"], last["error"]["request_id"]) == ("draining", replies["stream"].headers["x-request-id"])
    assert (engine.running, engine.cancelled) == (0, 2)
    assert draining.seconds < 3


async def test_a_client_that_does_not_read_cannot_hold_a_drain(releases: Path) -> None:
    engine = ScriptedEngine([Delta("x" * 4096), 0.0] * 20_000)
    draining = Draining(releases, engine, drain_s=0.3)
    running = asyncio.create_task(draining.server.serve(sockets=[draining.listener]))
    await until(lambda: draining.server.started and bool(engine.loaded))
    _, writer = await asyncio.open_connection("127.0.0.1", draining.listener.getsockname()[1], limit=1024)
    body = b'{"message":"a", "stream":true}'
    writer.write(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n" + body)
    await until(lambda: engine.running == 1)
    await asyncio.sleep(0.2)
    draining.server.should_exit = True
    await asyncio.wait_for(running, 10)
    assert engine.running == 0
    writer.close()


async def test_an_idle_server_stops_at_once(releases: Path) -> None:
    draining = Draining(releases, ScriptedEngine(), drain_s=60)
    running = asyncio.create_task(draining.server.serve(sockets=[draining.listener]))
    await until(lambda: draining.server.started)
    draining.server.should_exit = True
    await asyncio.wait_for(running, 3)
