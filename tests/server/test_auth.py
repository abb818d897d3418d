"""Keys in their file, and the Guard before every path."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.auth import Keys, is_loopback
from server.chat import Delta, Finish, Usage
from server.errors import EngineError, SetupError
from server.limits import Limits
from server.release.keeper import LOOK_S
from tests.server.scripted import ScriptedEngine, serving, small_release, until

MANY = Limits(1000, 100)
HI = {"message": "Hi"}


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    small_release(tmp_path)
    return tmp_path


@pytest.fixture
def keys(releases: Path) -> Keys:
    """The keys of the server that is tested, as `make key` opens them."""
    return Keys.open(releases / "state" / "keys.json")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_a_key_opens_as_its_name_with_its_limits_and_nothing_else_does(tmp_path: Path) -> None:
    keys = Keys.open(tmp_path / "keys.json")
    alice, bob = keys.make("alice", Limits(5, 2)), keys.make("bob", MANY)
    found = keys.check(alice)
    assert found and (found.name, found.limits) == ("alice", Limits(5, 2))
    assert (bob_is := keys.check(bob)) and bob_is.name == "bob"
    assert [keys.check(secret) for secret in ("", alice[:-1], alice + "x", bob.upper(), "\udcff")] == [None] * 5
    assert alice.startswith("tr-") and len(alice) == 46 and alice != bob


def test_the_file_holds_hashes_only_and_is_its_owner_s_only(tmp_path: Path) -> None:
    path = tmp_path / "volume" / "keys.json"
    secret = Keys.open(path).make("alice", MANY)
    assert path.stat().st_mode & 0o777 == 0o600
    for file in path.parent.iterdir():
        assert secret not in file.read_text() and secret.removeprefix("tr-") not in file.read_text()


def test_a_key_made_or_removed_elsewhere_is_known_at_once(tmp_path: Path) -> None:
    ours, theirs = Keys.open(tmp_path / "keys.json"), Keys.open(tmp_path / "keys.json")
    assert len(ours) == 0
    secret = theirs.make("alice", MANY)
    assert ours.check(secret)
    theirs.remove("alice")
    assert ours.check(secret) is None and len(ours) == 0


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    def make(number: int) -> str:
        return Keys.open(tmp_path / "keys.json").make(f"key-{number}", MANY)

    with ThreadPoolExecutor(8) as threads:
        secrets = list(threads.map(make, range(24)))
    keys = Keys.open(tmp_path / "keys.json")
    assert {caller.name for secret in secrets if (caller := keys.check(secret))} == {f"key-{number}" for number in range(24)}


def test_names_that_are_taken_or_strange_are_refused_and_unknown_ones_too(tmp_path: Path) -> None:
    keys = Keys.open(tmp_path / "keys.json")
    keys.make("alice", MANY)
    for name, words in (("alice", "already"), ("a b", "name"), ("", "name"), ("a\nb", "name")):
        with pytest.raises(SetupError, match=words):
            keys.make(name, MANY)
    with pytest.raises(SetupError, match="no key named bob, but: alice"):
        keys.remove("bob")


@pytest.mark.parametrize("content", ["", "[]", '{"keys": [{"name": "a"}]}', '{"kees": []}', "\x00"])
def test_a_broken_file_stops_the_start_but_not_a_server_that_knows_its_keys(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    keys = Keys.open(path)
    secret = keys.make("alice", MANY)
    path.write_text(content)
    assert keys.check(secret) and keys.check(secret)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(SetupError, match="make key"):
        Keys.open(path)


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "127.8.8.8", "::1", "[::1]"])
def test_names_of_the_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "::", "10.0.0.1", "192.168.0.1", "localhost.evil.example", "127.0.0.1.evil.example", "0", "2130706433"]
)
def test_names_that_are_not_the_loopback_s(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.anyio
async def test_with_a_key_everything_but_the_open_paths_wants_one(releases: Path, keys: Keys) -> None:
    secret = keys.make("alice", MANY)
    wrong: list[Any] = [
        {},
        bearer("tr-wrong"),
        {"Authorization": secret},
        {"Authorization": f"Basic {secret}"},
        {"Authorization": "Bearer"},
        [("Authorization", f"Bearer {secret}"), ("Authorization", f"Bearer {secret}")],
    ]
    async with serving(ScriptedEngine(), releases) as client:
        refused = [await client.post("/chat", json=HI, headers=headers) for headers in wrong]
        refused += [await client.get(path) for path in ("/v1/models", "/metrics", "/nothing", "/chat", "/healthz/x", "/Healthz")]
        opened = [await client.get(path) for path in ("/", "/healthz", "/readyz")]
        answered = await client.post("/chat", json=HI, headers={"Authorization": f"bearer  {secret}"})
        looked = await client.get("/metrics", headers=bearer(secret))
    for reply in refused:
        assert (reply.status_code, reply.headers["www-authenticate"], reply.json()["error"]["code"]) == (401, "Bearer", "unauthorized")
        assert "make key" in reply.json()["error"]["message"]
        assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]
    assert [reply.status_code for reply in (*opened, answered, looked)] == [200] * 5


@pytest.mark.anyio
async def test_readyz_tells_who_has_no_key_whether_and_nothing_else(releases: Path, keys: Keys) -> None:
    secret = keys.make("alice", MANY)
    engine = ScriptedEngine()
    async with serving(engine, releases) as client:
        well = [await client.get("/readyz", headers=headers) for headers in ({}, bearer("tr-wrong"), bearer(secret))]
        engine.problem = EngineError("no Ollama at http://10.0.0.1:11434, /srv/models")
        await asyncio.sleep(LOOK_S)
        ill = [await client.get("/readyz", headers=headers) for headers in ({}, bearer("tr-wrong"), bearer(secret))]
        engine.problem = None
    assert [reply.json() for reply in well[:2]] == [{"status": "ready"}] * 2
    assert well[2].json() == {"status": "ready", "model": "trinity:small-0123456789ab", "engine": "scripted"}
    assert [(reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) for reply in ill] == [
        (503, "not_ready", "5")
    ] * 3
    assert ["10.0.0.1" in reply.text or "/srv" in reply.text for reply in ill] == [False, False, True]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "headers"), [({"host": "::"}, {}), ({}, {"X-Forwarded-For": "203.0.113.5"}), ({}, {"Host": "rebound.example"})]
)
async def test_readyz_tells_no_paths_to_who_may_ask_nothing_else(tmp_path: Path, changes: dict[str, Any], headers: dict[str, str]) -> None:
    async with serving(ScriptedEngine(), tmp_path, wait=False, **changes) as client:
        reply = await client.get("/readyz", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert str(tmp_path) not in reply.text


@pytest.mark.anyio
async def test_a_key_is_proof_enough_for_json_without_its_content_type(releases: Path, keys: Keys) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    async with serving(ScriptedEngine(), releases) as client:
        without = await client.post("/chat", content=json.dumps(HI), headers=form)
        secret = keys.make("alice", MANY)
        replies = [
            await client.post("/chat", content=json.dumps(HI), headers=form | bearer(secret)),
            await client.post("/chat", content=json.dumps(HI), headers=bearer(secret)),
            await client.post("/chat", content="message=Hi", headers=form | bearer(secret)),
        ]
    assert (without.status_code, without.json()["error"]["code"]) == (415, "no_json_type")
    assert [reply.status_code for reply in replies] == [200, 200, 400]


@pytest.mark.anyio
async def test_a_server_that_others_can_reach_never_answers_without_a_key(releases: Path, keys: Keys) -> None:
    async with serving(ScriptedEngine(), releases, host="::") as client:
        assert (await client.post("/chat", json=HI)).status_code == 401
        secret = keys.make("alice", MANY)
        assert (await client.post("/chat", json=HI, headers=bearer(secret))).status_code == 200
        keys.remove("alice")
        assert (await client.post("/chat", json=HI)).status_code == 401


@pytest.mark.anyio
async def test_without_a_key_only_names_of_the_loopback_and_listed_ones_are_answered(releases: Path) -> None:
    good = ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "Gateway.Example:80", "gateway.example"]
    bad = ["evil.example", "localhost.evil.example:8080", "10.0.0.1", "", "127.0.0.1@evil.example", "[::1", "x:y:z", "gateway.example.evil"]
    async with serving(ScriptedEngine(), releases, allowed_hosts=("gateway.example",)) as client:
        answered = [(await client.post("/chat", json=HI, headers={"Host": host})).status_code for host in good]
        refused = [await client.post("/chat", json=HI, headers={"Host": host}) for host in bad]
        health = await client.get("/readyz", headers={"Host": "10.0.0.1"})
    assert answered == [200] * len(good)
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in refused] == [(421, "forbidden_host")] * len(bad)
    assert health.status_code == 200, "a health check knows an address only"


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"])
async def test_without_a_key_what_came_through_a_proxy_is_refused(releases: Path, keys: Keys, name: str) -> None:
    async with serving(ScriptedEngine(), releases) as client:
        refused = await client.post("/chat", json=HI, headers={name: "203.0.113.7"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (421, "forbidden_host")
        assert "make key" in refused.json()["error"]["message"]
        assert (await client.post("/chat", json=HI)).status_code == 200
        secret = keys.make("alice", MANY)
        assert (await client.post("/chat", json=HI, headers=bearer(secret) | {name: "203.0.113.7"})).status_code == 200


@pytest.mark.anyio
async def test_with_a_key_any_host_is_answered(releases: Path, keys: Keys) -> None:
    secret = keys.make("alice", MANY)
    async with serving(ScriptedEngine(), releases) as client:
        assert (await client.post("/chat", json=HI, headers=bearer(secret) | {"Host": "gateway.example"})).status_code == 200


@pytest.mark.anyio
async def test_more_than_a_key_may_ask_a_minute_is_a_429_that_says_when_and_touches_nobody_else(releases: Path, keys: Keys) -> None:
    alice, bob = keys.make("alice", Limits(2, 5)), keys.make("bob", Limits(2, 5))
    async with serving(ScriptedEngine(), releases) as client:
        replies = [await client.post("/chat", json=HI, headers=bearer(alice)) for _ in range(3)]
        other = await client.post("/chat", json=HI, headers=bearer(bob))
        looking = [(await client.get("/v1/models", headers=bearer(alice))).status_code for _ in range(5)]
    assert [reply.status_code for reply in (*replies, other)] == [200, 200, 429, 200]
    assert looking == [200] * 5
    assert 50 <= int(replies[2].headers["retry-after"]) <= 60
    assert replies[2].json()["error"]["code"] == "too_many_requests"


@pytest.mark.anyio
async def test_more_than_a_key_may_ask_at_a_time_is_a_429_until_one_ends_however_it_ends(releases: Path, keys: Keys) -> None:
    alice = bearer(keys.make("alice", Limits(100, 1)))
    engine = ScriptedEngine([Delta("a"), 30.0, Finish("stop", Usage(1, 1))], slots=5)
    async with serving(engine, releases) as client:
        first = asyncio.create_task(client.post("/chat", json={**HI, "stream": True}, headers=alice))
        await until(lambda: engine.running == 1)
        second = await client.post("/chat", json=HI, headers=alice)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await until(lambda: engine.running == 0)
        engine.script = ScriptedEngine().script
        broken = await client.post("/chat", content="{", headers=alice)
        third = await client.post("/chat", json=HI, headers=alice)
    assert [reply.status_code for reply in (second, broken, third)] == [429, 400, 200]
    assert second.headers["retry-after"] == "1"


async def preflight(client: httpx2.AsyncClient, origin: str) -> httpx2.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return await client.options("/chat", headers=asked)


@pytest.mark.anyio
async def test_pages_of_other_origins_may_not_call_unless_they_are_listed(releases: Path, keys: Keys) -> None:
    secret = keys.make("alice", MANY)
    async with serving(ScriptedEngine(), releases) as client:
        silent = await preflight(client, "https://a.example")
    async with serving(ScriptedEngine(), releases, cors_origins=("https://a.example",)) as client:
        listed, other = await preflight(client, "https://a.example"), await preflight(client, "https://b.example")
        called = await client.post("/chat", json=HI, headers=bearer(secret) | {"Origin": "https://a.example"})
        refused = await client.post("/chat", json=HI, headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in silent.headers and "access-control-allow-origin" not in other.headers
    assert listed.status_code == 200
    assert [reply.headers["access-control-allow-origin"] for reply in (listed, called, refused)] == ["https://a.example"] * 3
    assert (called.status_code, refused.status_code) == (200, 401), "a page must be able to read why"
