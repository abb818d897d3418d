"""Which release a gateway serves, and what it does with the one before."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server import conversation, manifest
from server.chat import Delta, Event, Finish, Message, Wishes
from server.engines import Engine, Status
from server.engines.embedded import EmbeddedEngine
from server.errors import EngineError, NotReady, ReleaseError, SetupError
from server.manifest import Release
from server.release import Keeper, first_look
from server.release.keeper import LOOK_S
from server.release.state import STALE_S, Entry, State, Wanted
from tests.server.real import lives
from tests.server.scripted import ScriptedEngine, serving, small_release, until

pytestmark = pytest.mark.anyio
A, B, C = "a-0123456789ab", "b-0123456789ab", "c-0123456789ab"


class Shelf(ScriptedEngine):
    """Holds any number of models, as an Ollama does, and writes down what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, str] = {}
        self.loads: list[str] = []

    async def load(self, release: Release) -> str:
        self.loads.append(release.manifest.release)
        digest = await super().load(release)
        self.models[release.model] = digest
        return digest

    async def status(self, model: str) -> Status:
        return Status(model in self.models, self.models.get(model, ""), "scripted")

    async def unload(self, model: str) -> None:
        del self.models[model]


@asynccontextmanager
async def keeping(releases: Path, engine: Engine, state: State | None = None) -> AsyncIterator[Keeper]:
    keeper = Keeper(releases, engine, (state or State(releases / "state")).directory, poll_s=0.01)
    running = asyncio.create_task(keeper.run())
    running.add_done_callback(keeper.ended)
    try:
        yield keeper
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def serves(keeper: Keeper, name: str) -> bool:
    try:
        return keeper.serving().manifest.release == name
    except (NotReady, ReleaseError):
        return False


def loaded(state: State, engine: Shelf, release: Release, previous: Entry | None = None) -> Entry:
    """What a loader leaves: the engine has the model, and release.json names it."""
    engine.models[release.model] = release.sha256
    live = Entry(directory=release.directory, digest=release.sha256, manifest=release.manifest, probes=release.probes)
    state.directory.mkdir(exist_ok=True)
    state.write(Wanted(engine="ollama", live=live, previous=previous))
    return live


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state")


async def test_a_new_current_is_served_and_the_one_before_unloaded(tmp_path: Path) -> None:
    engine = Shelf()
    small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await until(lambda: serves(keeper, A))
        small_release(tmp_path, B)
        await until(lambda: serves(keeper, B) and list(engine.models) == [f"trinity:{B}"])
        assert await keeper.ready() == "scripted"


async def test_a_release_is_not_unloaded_before_its_last_answer(tmp_path: Path) -> None:
    engine = Shelf()
    small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await until(lambda: serves(keeper, A))
        async with keeper.lease() as first, keeper.lease():
            small_release(tmp_path, B)
            await until(lambda: serves(keeper, B))
            async with keeper.lease() as second:
                await asyncio.sleep(0.1)
                assert (first.manifest.release, second.manifest.release) == (A, B)
                assert f"trinity:{A}" in engine.models
        await until(lambda: list(engine.models) == [f"trinity:{B}"])


async def test_a_release_that_comes_back_while_it_drains_stays(tmp_path: Path) -> None:
    engine = Shelf()
    small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await until(lambda: serves(keeper, A))
        async with keeper.lease():
            small_release(tmp_path, B)
            await until(lambda: serves(keeper, B))
            point(tmp_path / "current", tmp_path / A)
            await until(lambda: serves(keeper, A))
        await until(lambda: f"trinity:{B}" not in engine.models)
        await asyncio.sleep(0.1)
        assert f"trinity:{A}" in engine.models


async def test_a_bad_release_does_not_take_the_place_of_a_good_one_and_is_named(tmp_path: Path) -> None:
    engine = Shelf()
    small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await until(lambda: serves(keeper, A))
        (small_release(tmp_path, B) / "model.gguf").write_bytes(b"GGUF and nothing elsf")
        await asyncio.sleep(0.2)
        assert serves(keeper, A)
        assert f"wanted but not served: files.gguf: {tmp_path / B}" in await keeper.ready()
        engine.problem = ReleaseError("probe 0")
        small_release(tmp_path, C)
        await asyncio.sleep(0.2)
        assert serves(keeper, A)
        assert engine.loads == [A, C], "a release that was refused is not tried for ever"
        engine.problem = None
        os.utime(tmp_path / C / "manifest.json")
        await until(lambda: serves(keeper, C))
        assert await keeper.ready() == "scripted"


async def test_an_engine_that_fails_is_asked_again_and_not_at_once(tmp_path: Path) -> None:
    engine = Shelf()
    engine.problem = EngineError("starting")
    small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await asyncio.sleep(0.5)
        assert engine.loads == [A]
        with pytest.raises(NotReady, match="starting"):
            keeper.serving()
        engine.problem = None
        await until(lambda: serves(keeper, A))


class Mistaken(Shelf):
    """Raises what no engine should."""

    def __init__(self) -> None:
        super().__init__()
        self.fatal = False

    async def check(self) -> None:
        if self.fatal:
            raise StopAsyncIteration


async def test_a_mistake_is_told_survived_and_tried_again(tmp_path: Path, state: State) -> None:
    engine = Shelf()
    small_release(tmp_path, A)
    state.directory.mkdir()
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: serves(keeper, A))
        engine.problem = ValueError("no JSON from a proxy before the engine")
        small_release(tmp_path, B)
        await until(lambda: engine.loads == [A, B])
        await asyncio.sleep(0.1)
        assert serves(keeper, A) and "wanted but not served: the server made a mistake" in await keeper.ready()
        with state.mark():
            waiting = asyncio.create_task(leased(keeper))
            await asyncio.sleep(0.1)
            assert not waiting.done()
        assert await asyncio.wait_for(waiting, 1) == A, "the gate opens though the next look is seconds away"
        engine.problem = None
        await until(lambda: serves(keeper, B))
        assert await keeper.ready() == "scripted"


async def test_a_watch_that_ended_all_the_same_is_not_ready_and_closes_no_gate(tmp_path: Path, state: State) -> None:
    engine = Mistaken()
    release = manifest.read(small_release(tmp_path, A))
    loaded(state, engine, release)
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: serves(keeper, A))
        engine.fatal = True
        loaded(state, engine, manifest.read(small_release(tmp_path, B)))
        await asyncio.sleep(0.2)
        with pytest.raises(NotReady, match="start it again"):
            await keeper.ready()
        with state.mark():
            assert await asyncio.wait_for(leased(keeper), 1) == A


async def test_another_content_under_the_id_in_service_is_refused_before_the_engine_hears_of_it(tmp_path: Path) -> None:
    engine = Shelf()
    directory = small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await until(lambda: serves(keeper, A))
        text = (directory / "manifest.json").read_text(encoding="utf-8")
        assert '"num_ctx": 4096' in text
        (directory / "manifest.json").write_text(text.replace('"num_ctx": 4096', '"num_ctx": 512'), encoding="utf-8")
        await asyncio.sleep(0.2)
        assert keeper.serving().manifest.prompt.num_ctx == 4096
        assert engine.loads == [A] and "an id names one content: release again" in await keeper.ready()


async def test_what_a_loader_wants_is_served_without_loading_it_again_though_its_files_are_gone(tmp_path: Path, state: State) -> None:
    engine = Shelf()
    small_release(tmp_path, A)
    release = manifest.read(small_release(tmp_path / "away", B))
    loaded(state, engine, release)
    (release.gguf).unlink()
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: serves(keeper, B))
        assert engine.loads == [], "current is not what is wanted once a loader has said so"
        loaded(state, engine, manifest.read(tmp_path / A))
        await until(lambda: serves(keeper, A) and list(engine.models) == [f"trinity:{A}"])


async def test_where_a_loader_brings_releases_nothing_is_loaded_twice(tmp_path: Path, state: State) -> None:
    release, engine = manifest.read(small_release(tmp_path, A)), Shelf()
    keeper = Keeper(tmp_path, engine, state.directory, poll_s=0.01, wait_for_loader=True)
    running = asyncio.create_task(keeper.run())
    await until(lambda: "waits for the loader" in why(keeper))
    loaded(state, engine, release)
    await until(lambda: serves(keeper, A))
    assert engine.loads == []
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_an_engine_that_is_not_there_yet_has_not_lost_its_model(tmp_path: Path, state: State) -> None:
    engine = Shelf()
    release = manifest.read(small_release(tmp_path, A))
    loaded(state, engine, release)
    release.gguf.unlink()
    engine.problem = SetupError("no Ollama answers")
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: why(keeper) == "no Ollama answers")
        engine.problem = None
        await until(lambda: serves(keeper, A))
    assert engine.loads == []


async def test_what_the_engine_has_not_as_it_was_loaded_is_loaded_from_its_files(tmp_path: Path, state: State) -> None:
    engine = Shelf()
    release = manifest.read(small_release(tmp_path, A))
    loaded(state, engine, release)
    engine.models[release.model] = "another"
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: serves(keeper, A))
        assert engine.loads == [A]
        engine.models[release.model] = "another"
        with pytest.raises(NotReady, match="was replaced at the engine"):
            await keeper.ready()


class Asked(Shelf):
    """Counts how often its status is asked for, which takes it a while."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    async def status(self, model: str) -> Status:
        self.looks += 1
        await asyncio.sleep(0.05)
        return await super().status(model)


async def test_many_who_ask_whether_it_is_ready_cost_the_engine_one_look_a_second(tmp_path: Path) -> None:
    engine = Asked()
    small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await until(lambda: serves(keeper, A))
        began, asked = time.monotonic(), 0
        while time.monotonic() < began + 2 * LOOK_S:
            impatient = asyncio.create_task(keeper.ready())
            await asyncio.sleep(0)
            impatient.cancel()
            assert await asyncio.gather(*(keeper.ready() for _ in range(50))) == ["scripted"] * 50
            asked += 50
            await asyncio.sleep(0.01)
        assert asked > 500 and 2 <= engine.looks <= 3
        engine.models.clear()
        await asyncio.sleep(LOOK_S)
        with pytest.raises(NotReady):
            await keeper.ready()


async def test_a_release_that_has_just_come_is_not_judged_by_a_look_at_the_one_before(tmp_path: Path) -> None:
    engine = Asked()
    small_release(tmp_path, A)
    async with keeping(tmp_path, engine) as keeper:
        await until(lambda: serves(keeper, A))
        engine.models.clear()
        with pytest.raises(NotReady):
            await keeper.ready()
        small_release(tmp_path, B)
        await until(lambda: serves(keeper, B))
        assert await keeper.ready() == "scripted"


async def test_files_that_are_another_release_by_now_are_refused(tmp_path: Path, state: State) -> None:
    engine = Shelf()
    entry = loaded(state, engine, manifest.read(small_release(tmp_path, A)))
    engine.models.clear()
    other = entry.manifest.model_copy(update={"quantization": "q8_0"})
    state.write(Wanted(engine="ollama", live=entry.model_copy(update={"manifest": other})))
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: "is not trinity:a-0123456789ab any more" in why(keeper))


def why(keeper: Keeper) -> str:
    try:
        keeper.serving()
    except (NotReady, ReleaseError) as error:
        return str(error)
    return ""


async def test_requests_wait_while_a_loader_needs_the_only_slot_and_then_get_the_new_release(tmp_path: Path, state: State) -> None:
    engine = Shelf()
    loaded(state, engine, manifest.read(small_release(tmp_path, A)))
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: serves(keeper, A))
        with state.mark():
            waiting = [asyncio.create_task(leased(keeper)) for _ in range(3)]
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in waiting)
            loaded(state, engine, manifest.read(small_release(tmp_path, B)))
        assert await asyncio.gather(*waiting) == [B, B, B]


async def test_a_loader_that_was_killed_holds_nobody_up_for_long(tmp_path: Path, state: State) -> None:
    engine = Shelf()
    loaded(state, engine, manifest.read(small_release(tmp_path, A)))
    async with keeping(tmp_path, engine, state) as keeper:
        await until(lambda: serves(keeper, A))
        with state.mark():
            waiting = asyncio.create_task(leased(keeper))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            long_ago = time.time() - STALE_S - 1
            os.utime(state.directory / "loading", (long_ago, long_ago))
            assert await asyncio.wait_for(waiting, 5) == A


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_names_the_release_that_gave_it_and_not_the_one_at_its_arrival(
    tmp_path: Path, state: State, path: str, stream: bool
) -> None:
    engine = Shelf()
    loaded(state, engine, manifest.read(small_release(tmp_path, A)))
    async with serving(engine, tmp_path, wait=False) as client:
        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110  # what is waited for is asked over HTTP
            await asyncio.sleep(0.05)
        with state.mark():
            body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
            asking = asyncio.create_task(client.post(path, json=body))
            await asyncio.sleep(0.2)
            assert not asking.done()
            loaded(state, engine, manifest.read(small_release(tmp_path, B)))
        text = (await asking).text
    assert f"trinity:{B}" in text and f"trinity:{A}" not in text


async def leased(keeper: Keeper) -> str:
    async with keeper.lease() as release:
        return release.manifest.release


def test_a_gateway_that_starts_now_is_told_what_it_will_serve(tmp_path: Path, state: State) -> None:
    assert first_look(tmp_path, state.directory) is None
    release = manifest.read(small_release(tmp_path, A))
    assert "every file as it was released" in (first_look(tmp_path, state.directory) or "")
    loaded(state, Shelf(), release)
    release.gguf.write_bytes(b"")
    assert first_look(tmp_path, state.directory) == f"trinity:{A}, which was loaded from {tmp_path / A}"


async def test_the_embedded_engine_switches_by_a_second_child_while_the_first_finishes(release: Release, tmp_path: Path) -> None:
    """The real thing: an answer that began with the first release ends with it, long after the second one answers."""
    copy = tmp_path / "second-0123456789ab"
    renamed(release, copy)
    (tmp_path / "current").symlink_to(release.directory)
    engine = EmbeddedEngine(slots=1, threads=1, start_timeout_s=120)
    try:
        async with keeping(tmp_path, engine) as keeper:
            await until(lambda: serves(keeper, release.manifest.release), 120)
            first = engine.child_pid
            assert first
            async with keeper.lease() as leased:
                stream = answer(engine, leased)
                assert isinstance(await anext(stream), Delta)
                point(tmp_path / "current", copy)
                await until(lambda: serves(keeper, copy.name), 120)
                assert engine.child_pid != first and lives(first)
                async with keeper.lease() as new:
                    assert new.manifest.release == copy.name
                    assert [event async for event in answer(engine, new)]
                assert isinstance([event async for event in stream][-1], Finish)
            await until(lambda: not lives(first))
            assert engine.child_alive
    finally:
        await engine.close()


def answer(engine: EmbeddedEngine, release: Release) -> AsyncGenerator[Event]:
    request = conversation.request([Message("user", "One, two, three, four,")], Wishes(temperature=0.0), release.manifest.prompt)
    return engine.chat(release.model, request)


def renamed(release: Release, directory: Path) -> None:
    """The same files as a release of another name."""
    directory.mkdir()
    for file in release.directory.iterdir():
        if file.name != "manifest.json":
            os.link(file, directory / file.name)
    text = (release.directory / "manifest.json").read_text(encoding="utf-8")
    (directory / "manifest.json").write_text(text.replace(release.manifest.release, directory.name), encoding="utf-8")


def point(link: Path, target: Path) -> None:
    new = link.with_suffix(".new")
    new.symlink_to(target)
    new.replace(link)
