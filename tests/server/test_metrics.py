"""What /metrics tells after requests of every kind, read as Prometheus reads it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.auth import Keys
from server.chat import Delta, Finish, Usage
from server.errors import EngineError
from server.limits import Limits
from tests.server.scripted import ScriptedEngine, serving, small_release, until

pytestmark = pytest.mark.anyio
HI = {"message": "Hi"}


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path)
    return tmp_path


async def samples(client: httpx2.AsyncClient) -> dict[str, float]:
    """Every sample by its name and the values of its labels (caller, path, status); empty ones are left out."""
    await asyncio.sleep(0.05)  # a request ends a little after its last byte
    reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(reply.text)
    return {" ".join((found.name, *filter(None, found.labels.values()))): found.value for family in families for found in family.samples}


async def test_answers_are_counted_and_timed(releases: Path) -> None:
    engine = ScriptedEngine([0.2, Delta("a"), 0.5, Delta("b"), Finish("length", Usage(7, 11))])
    async with serving(engine, releases) as client:
        for stream in (False, True):
            await client.post("/chat", json={**HI, "stream": stream})
        found = await samples(client)
    assert found["trinity_requests_total /chat 200"] == found["trinity_answers_total length"] == 2
    assert (found["trinity_tokens_total prompt"], found["trinity_tokens_total completion"]) == (14, 22)
    assert found["trinity_first_token_seconds_count"] == found["trinity_tokens_per_second_count"] == 2
    assert 0.4 <= found["trinity_first_token_seconds_sum"] < 0.8
    assert 30 < found["trinity_tokens_per_second_sum"] <= 40, "ten tokens in half a second, twice"
    assert found["trinity_release trinity:small-0123456789ab small-0123456789ab"] == 1
    assert found["trinity_answers_in_flight"] == 0
    assert found["trinity_requests_in_flight"] == 1, "the one that asks"


async def test_errors_of_the_engine_and_of_clients_are_told_apart(releases: Path) -> None:
    async with serving(ScriptedEngine([Delta("a"), EngineError("gone")]), releases) as client:
        await client.post("/chat", json=HI)
        await client.post("/chat", json={**HI, "stream": True})
        await client.post("/chat", json={"massage": "Hi"})
        found = await samples(client)
    assert found["trinity_engine_errors_total engine_failed"] == found["trinity_answers_total engine_failed"] == 2
    assert [found[f"trinity_requests_total /chat {status}"] for status in (200, 400, 502)] == [1, 1, 1]


async def test_the_queue_shows_its_length_its_places_and_its_waits(releases: Path) -> None:
    engine = ScriptedEngine([0.4, *ScriptedEngine().script])
    async with serving(engine, releases, waiting=2) as client:
        asking = [asyncio.create_task(client.post("/chat", json=HI)) for _ in range(4)]
        await until(lambda: engine.running == 1)
        await asyncio.sleep(0.1)
        during = await samples(client)
        await asyncio.gather(*asking)
        after = await samples(client)
    assert (during["trinity_queue_length"], during["trinity_answers_in_flight"], after["trinity_queue_length"]) == (2, 1, 0)
    assert (after["trinity_queue_position_count"], after["trinity_queue_position_sum"]) == (2, 3)
    assert after["trinity_queue_seconds_count"] == 3
    assert 1.0 < after["trinity_queue_seconds_sum"] < 2.0, "0, 0.4 and 0.8 s"
    assert after["trinity_answers_total queue_full"] == after["trinity_requests_total /chat 503"] == 1


async def test_strange_paths_and_methods_make_no_new_series(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        for number in range(5):
            await client.get(f"/prompt-{number}")
            await client.request(f"METHOD{number}", "/chat")
        found = await samples(client)
    paths = {name.split()[1] for name in found if name.startswith("trinity_requests_total")}
    assert paths <= {"other", "/chat"}
    assert found["trinity_requests_total other 404"] == 5


async def test_requests_carry_their_caller_s_name_and_metrics_want_a_key(releases: Path) -> None:
    secret = Keys.open(releases / "state" / "keys.json").make("alice", Limits(9, 9))
    async with serving(ScriptedEngine(), releases) as client:
        await client.post("/chat", json=HI)
        assert (await client.get("/metrics")).status_code == 401
        client.headers["Authorization"] = f"Bearer {secret}"
        await client.post("/chat", json=HI)
        found = await samples(client)
    assert found["trinity_requests_total alice /chat 200"] == 1
    assert found["trinity_requests_total other 401"] == 2
    assert not any(secret in name for name in found)


async def test_two_applications_count_apart(releases: Path) -> None:
    async with serving(ScriptedEngine(), releases) as one, serving(ScriptedEngine(), releases) as other:
        await one.post("/chat", json=HI)
        assert (await samples(one))["trinity_answers_total stop"] == 1
        assert "trinity_answers_total stop" not in await samples(other)


async def test_without_a_release_none_is_shown(tmp_path: Path) -> None:
    async with serving(ScriptedEngine(), tmp_path, wait=False) as client:
        assert not any(name.startswith("trinity_release") for name in await samples(client))
