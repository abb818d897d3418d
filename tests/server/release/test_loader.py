"""The loader against the embedded engine, and as the command that people run; with a real Ollama it is tests/e2e/test_release_load.py."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import cast

import pytest

from server import manifest
from server.chat import Finish, Usage
from server.engines.embedded import EmbeddedEngine
from server.errors import ReleaseError
from server.manifest import Release
from server.release import cli, space
from server.release.loader import Host, Loader
from server.release.state import State, Wanted
from server.settings import Settings
from tests.server.real import ROOT, clean_environment
from tests.server.scripted import ScriptedEngine, until

pytestmark = pytest.mark.anyio
KILLS = 5
SECOND, THIRD = "second-0123456789ab", "third-0123456789ab"


class Shop:
    """A directory of releases with a loader of the embedded engine."""

    def __init__(self, folder: Path, base: Release) -> None:
        self.base = base
        self.releases, self.state = folder / "gguf", State(folder / "state")
        self.releases.mkdir()
        self.said: list[str] = []

    def add(self, name: str, change: Callable[[str], str] = lambda text: text) -> Path:
        """The base release's files under another name."""
        directory = self.releases / name
        directory.mkdir()
        for file in self.base.directory.iterdir():
            if file.name != "manifest.json":
                os.link(file, directory / file.name)
        text = (self.base.directory / "manifest.json").read_text(encoding="utf-8")
        (directory / "manifest.json").write_text(change(text.replace(self.base.manifest.release, name)), encoding="utf-8")
        return directory

    def loader(self, **changes: object) -> Loader:
        chosen = Settings(**{"releases": self.releases, "state": self.state.directory, "threads": 1, **changes})  # type: ignore[arg-type]
        return Loader(chosen, cast("Host", EmbeddedEngine(1, 1, 120)), self.said.append)

    def scripted(self, store: Store, **changes: object) -> Loader:
        chosen = {"releases": self.releases, "state": self.state.directory, "engine_memory_bytes": 1 << 40, **changes}
        return Loader(Settings(**chosen), store, self.said.append)  # type: ignore[arg-type]

    async def load(self, source: Path) -> None:
        loader = self.loader()
        await loader.load(source)
        assert not cast("EmbeddedEngine", loader._host).child_alive, "a loader that watches must not keep a second model in memory"
        await loader._host.close()

    async def rollback(self) -> Wanted:
        loader = self.loader()
        wanted = await loader.rollback()
        await loader._host.close()
        return wanted

    def wanted(self) -> tuple[str, str]:
        wanted = self.state.read()
        assert wanted
        return wanted.live.manifest.release, wanted.previous.manifest.release if wanted.previous else ""

    def command(self, *words: str) -> list[str]:
        flags = ["--releases", str(self.releases), "--state", str(self.state.directory), "--threads", "1"]
        return [sys.executable, "-m", "server", "release", *words, *flags]

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*words), cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=clean_environment())

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), cwd=ROOT, capture_output=True, text=True, timeout=120, env=clean_environment())


@pytest.fixture
def shop(tmp_path: Path, release: Release) -> Shop:
    return Shop(tmp_path, release)


async def test_what_is_loaded_is_wanted_and_what_was_before_can_be_gone_back_to_and_forth(shop: Shop) -> None:
    for name in (SECOND, THIRD):
        await shop.load(shop.add(name))
    assert shop.wanted() == (THIRD, SECOND)
    await shop.load(shop.releases / THIRD)
    assert shop.wanted() == (THIRD, SECOND), "loading the same again changes nothing"
    loader = shop.loader()
    await loader.rollback()
    assert shop.wanted() == (SECOND, THIRD)
    await loader.rollback()
    assert shop.wanted() == (THIRD, SECOND)
    await loader._host.close()


@pytest.mark.parametrize("wrong", ["digest", "gguf", "probes", "memory"])
async def test_a_bad_release_never_takes_the_place_of_a_good_one(shop: Shop, wrong: str) -> None:
    await shop.load(shop.add(SECOND))
    before = shop.state.path.read_bytes()
    bad = shop.add(THIRD)
    if wrong == "digest":
        replace_file(bad / "model.gguf", flipped(shop.base.gguf.read_bytes()))
    elif wrong == "gguf":
        replace_file(bad / "model.gguf", shop.base.gguf.read_bytes()[: 1 << 20])
        describe_anew(bad, "gguf")
    elif wrong == "probes":
        lines = (bad / "probes.jsonl").read_text(encoding="utf-8").replace("<start_of_turn>model", "<start_of_turn>modal")
        replace_file(bad / "probes.jsonl", lines.encode())
        describe_anew(bad, "probes")
    words = {"digest": "was changed after", "gguf": "did not load", "probes": "renders another prompt", "memory": "of the engine's memory"}
    done = shop.run("load", str(bad), *(["--engine-memory-bytes", "100000000"] if wrong == "memory" else []))
    assert done.returncode == 2 and words[wrong] in done.stderr
    assert done.stderr.count("\n") == 1
    assert shop.state.path.read_bytes() == before
    assert not list(shop.state.directory.glob("releases/*"))


class Store(ScriptedEngine):
    """What the loader sees of an Ollama; the real one is asked in tests/e2e/test_release_load.py."""

    def __init__(self, state: State, lacking: int = 0) -> None:
        super().__init__([Finish("stop", Usage(2, 1))])
        self.state, self.lacking = state, lacking
        self.steps: list[str] = []

    async def lacks(self, release: Release) -> int:
        return self.lacking

    async def place(self, release: Release) -> None:
        self.steps.append("place, marked" if self.state.loading() else "place")

    async def load(self, release: Release) -> str:
        self.steps.append("load, marked" if self.state.loading() else "load")
        return await super().load(release)

    async def unload(self, model: str) -> None:
        self.steps.append("unload, too late" if self.state.path.exists() else "unload")
        await super().unload(model)

    async def held_bytes(self) -> int:
        return 0

    async def prune(self, name: str, keep: Collection[str]) -> list[str]:
        self.steps.append(f"prune, but {len(keep)}")
        return []


@pytest.mark.parametrize(("models", "load"), [(1, "load, marked"), (2, "load")])
async def test_requests_wait_only_for_the_probes_and_only_where_there_is_one_slot(shop: Shop, models: int, load: str) -> None:
    store = Store(shop.state)
    chosen = Settings(state=shop.state.directory, engine="ollama", engine_models=models)
    await Loader(chosen, store, shop.said.append).load(shop.add(SECOND))
    assert store.steps == ["place", load, "prune, but 1"]
    assert not shop.state.loading()


async def test_a_disk_without_room_for_ollamas_copy_is_said_before_anything_is_sent(shop: Shop, tmp_path: Path) -> None:
    store = Store(shop.state, lacking=1 << 60)
    chosen = Settings(state=shop.state.directory, engine="ollama", ollama_models=tmp_path)
    with pytest.raises(ReleaseError, match=r"does not fit on disk .*Ollama's copy 1152921504\.6 GB"):
        await Loader(chosen, store, shop.said.append).load(shop.add(SECOND))
    assert store.steps == [] and not shop.state.path.exists()


@pytest.mark.parametrize("limit", [0, 1 << 60])
async def test_a_limit_above_what_the_machine_has_free_does_not_count_where_the_engine_runs_on_it(shop: Shop, limit: int) -> None:
    chosen = {"engine": "ollama", "ollama_url": "http://ollama:11434", "engine_memory_bytes": limit}
    release = manifest.read(shop.add(SECOND))
    slots = space.machine_memory() // space.need(release, 1).cache  # contexts alone then fill it
    elsewhere = shop.scripted(Store(shop.state, lacking=1), slots=min(slots, 10_000), **chosen)
    with pytest.raises(ReleaseError, match="of the engine's memory"):
        await shop.scripted(Store(shop.state, lacking=1), slots=min(slots, 10_000), engine_here=True, **chosen).load(shop.releases / SECOND)
    await elsewhere.load(shop.releases / SECOND)


async def test_the_loaders_own_model_is_out_of_memory_before_gateways_hear_of_it(shop: Shop) -> None:
    store = Store(shop.state)
    await shop.scripted(store).load(shop.add(SECOND))
    assert store.steps == ["place", "load", "unload", "prune, but 1"]


async def test_another_content_under_the_id_in_service_is_refused_before_anything_is_touched(shop: Shop) -> None:
    store = Store(shop.state)
    directory = shop.add(SECOND)
    await shop.scripted(store).load(pack(directory))
    before, kept = shop.state.path.read_bytes(), shop.state.directory / "releases" / SECOND
    store.steps.clear()
    shop.add(SECOND, lambda text: text.replace('"num_ctx": 256', '"num_ctx": 512'))
    for packed in (False, True):
        with pytest.raises(ReleaseError, match="an id names one content: release again"):
            await shop.scripted(store).load(pack(directory) if packed else directory)
    assert store.steps == [] and shop.state.path.read_bytes() == before
    assert manifest.read(kept).manifest.prompt.num_ctx == 256


async def test_a_release_that_was_made_twice_is_loaded_though_its_time_differs(shop: Shop) -> None:
    store = Store(shop.state)
    directory = shop.add(SECOND)
    await shop.scripted(store).load(directory)
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"created": "2030-01-01T00:00:00Z"}), encoding="utf-8")
    assert (await shop.scripted(store).load(directory)).live.manifest.created.year == 2030


async def test_a_damaged_archive_does_not_stand_in_the_way_of_its_good_copy(shop: Shop) -> None:
    store = Store(shop.state)
    directory = shop.add(SECOND)
    replace_file(directory / "probes.jsonl", flipped(shop.base.directory.joinpath("probes.jsonl").read_bytes()))
    bad = pack(directory)
    with pytest.raises(ReleaseError, match=r"second-0123456789ab.tar, unpacked: .*probes.jsonl was changed"):
        await shop.scripted(store).load(bad)
    good = pack(shop.add(SECOND))
    await shop.scripted(store).load(good)
    kept = shop.state.directory / "releases" / SECOND
    replace_file(kept / "probes.jsonl", flipped((kept / "probes.jsonl").read_bytes()))
    await shop.scripted(store).load(good)
    assert manifest.read(kept).manifest.release == SECOND, "what was damaged after it was unpacked is unpacked once more"


async def test_what_can_be_gone_back_to_is_kept_however_the_state_directory_is_spelled(shop: Shop, tmp_path: Path) -> None:
    store = Store(shop.state)
    (tmp_path / "link").symlink_to(tmp_path)
    await shop.scripted(store).load(pack(shop.add(SECOND)))
    await shop.scripted(store, state=tmp_path / "link" / "state").load(pack(shop.add(THIRD)))
    assert sorted(path.name for path in (shop.state.directory / "releases").iterdir()) == [SECOND, THIRD]
    await shop.scripted(store).rollback()
    assert shop.wanted() == (SECOND, THIRD)


async def test_watch_tries_again_what_only_lacked_room_and_then_looks_no_more(shop: Shop, tmp_path: Path) -> None:
    store = Store(shop.state, lacking=1 << 60)
    shop.add(SECOND)
    watching = asyncio.create_task(shop.scripted(store, engine="ollama", ollama_models=tmp_path).watch(poll_s=0.01))
    try:
        await until(lambda: any("tried again: " in line and "does not fit on disk" in line for line in shop.said))
        store.lacking = 0
        await until(lambda: shop.state.path.exists() and not shop.state.loading())
        await until(lambda: store.steps[-1] == "prune, but 1")
        shop.state.path.unlink()
        await asyncio.sleep(0.3)
        assert not shop.state.path.exists(), "nothing changed there, so that nothing is opened"
        shop.add(THIRD)
        await until(shop.state.path.exists)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def replace_file(path: Path, content: bytes) -> None:
    """Not in place: the file is linked to the base release's."""
    path.unlink()
    path.write_bytes(content)


def describe_anew(directory: Path, name: str) -> None:
    """Make the manifest tell the truth about a file that was replaced: only an engine can see that it is bad."""
    import hashlib

    path = directory / "manifest.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    content = (directory / tree["files"][name]["path"]).read_bytes()
    tree["files"][name] |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(tree), encoding="utf-8")


def pack(directory: Path) -> Path:
    path = directory.with_suffix(".tar")
    with tarfile.open(path, "w") as file:
        file.add(directory, arcname=directory.name)
    shutil.rmtree(directory)
    return path


async def test_an_archive_is_kept_unpacked_while_it_may_be_served_and_no_longer(shop: Shop) -> None:
    packed = pack(shop.add(SECOND))
    await shop.load(packed)
    unpacked = shop.state.directory / "releases"
    assert [path.name for path in unpacked.iterdir()] == [SECOND]
    packed.unlink()
    await shop.load(shop.add(THIRD))
    await shop.rollback()
    assert shop.wanted() == (SECOND, THIRD), "a rollback needs no archive any more"
    for name in ("fourth-0123456789ab", "fifth-0123456789ab"):
        await shop.load(shop.add(name))
    assert not list(unpacked.iterdir())


async def test_a_disk_that_is_too_small_for_an_archive_is_said_before_it_is_unpacked(shop: Shop) -> None:
    directory = shop.add(SECOND)
    path = directory / "manifest.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    free = shutil.disk_usage(shop.releases).free
    tree["files"]["gguf"]["num_bytes"] = free + 1
    path.write_text(json.dumps(tree), encoding="utf-8")
    (directory / "model.gguf").unlink()
    with (directory / "model.gguf").open("wb") as sparse:
        sparse.truncate(free + 1)
    archive = shop.releases / "r.tar"
    write_sparse(archive, directory)
    with pytest.raises(ReleaseError, match="does not fit on disk beside the release before it"):
        await shop.loader().load(archive)
    assert not list(shop.state.directory.glob("releases/*"))


def write_sparse(path: Path, directory: Path) -> None:
    """A tar whose GGUF is one hole: its list promises more bytes than there are on this disk."""
    gguf = directory / "model.gguf"
    with tarfile.open(path, "w") as file:
        for item in directory.iterdir():
            if item != gguf:
                file.add(item, arcname=item.name)
        at = file.offset
    info = tarfile.TarInfo(gguf.name)
    info.size = gguf.stat().st_size
    with path.open("r+b") as raw:
        raw.seek(at)
        raw.write(info.tobuf(tarfile.GNU_FORMAT))
        raw.truncate(raw.tell() + info.size + 20 * 512)


def test_two_loaders_take_turns(shop: Shop) -> None:
    running = [shop.start("load", str(shop.add(name))) for name in (SECOND, THIRD)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sum("another loader is at work" in out for out, _ in said) == 1
    assert sorted(shop.wanted()) == [SECOND, THIRD]


def test_a_loader_that_is_killed_at_any_moment_leaves_the_old_or_the_new_and_the_next_one_finishes(shop: Shop) -> None:
    """Real SIGKILLs, spread over a whole load: reading, unpacking, hashing, starting, probing, writing."""
    assert shop.run("load", str(shop.add(SECOND))).returncode == 0
    before = shop.state.path.read_bytes()
    packed = pack(shop.add(THIRD))
    began = time.monotonic()
    assert shop.run("load", str(packed)).returncode == 0
    whole_s = time.monotonic() - began
    outcomes = []
    for trial in range(KILLS):
        shop.state.path.write_bytes(before)
        shutil.rmtree(shop.state.directory / "releases", ignore_errors=True)
        process = shop.start("load", str(packed))
        time.sleep(whole_s * (trial + random.Random(trial).random()) / KILLS)
        process.kill()
        process.communicate()
        outcomes.append(shop.wanted()[0])
        for directory in (shop.state.directory / "releases").glob("*[0-9a-f]"):
            assert manifest.read(directory).manifest.release == THIRD, "unpacked whole or not at all"
    assert SECOND in outcomes and set(outcomes) <= {SECOND, THIRD}
    assert shop.run("load", str(packed)).returncode == 0
    assert shop.wanted() == (THIRD, SECOND)
    assert sorted(path.name for path in shop.state.directory.glob("**/*") if path.is_dir()) == ["releases", THIRD], "nothing is left behind"


async def test_watch_loads_what_becomes_current_but_not_what_a_rollback_left(shop: Shop) -> None:
    loader = shop.loader()
    current = shop.releases / "current"
    shop.add(SECOND)
    current.symlink_to(SECOND)
    watching = asyncio.create_task(loader.watch(poll_s=0.05))
    try:
        await until(lambda: shop.state.path.exists() and shop.wanted()[0] == SECOND, 60)
        broken = shop.add("broken-0123456789ab", lambda text: text.replace('"schema_version": 1', '"schema_version": 9'))
        point(current, broken)
        await until(lambda: any("schema_version is 9" in line for line in shop.said), 60)
        point(current, shop.add(THIRD))
        await until(lambda: shop.wanted() == (THIRD, SECOND), 60)
        assert (await shop.rollback()).rolled_back == THIRD
        os.utime(shop.releases / THIRD / "manifest.json")
        await asyncio.sleep(0.5)
        assert shop.wanted() == (SECOND, THIRD)
        point(current, shop.add("fourth-0123456789ab"))
        await until(lambda: shop.wanted() == ("fourth-0123456789ab", SECOND), 60)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await loader._host.close()


def point(link: Path, target: Path) -> None:
    new = link.with_suffix(".new")
    new.symlink_to(target)
    new.replace(link)


async def test_watch_says_once_what_to_run_where_nothing_lies_yet_and_then_loads_what_comes(shop: Shop) -> None:
    loader = shop.loader()
    watching = asyncio.create_task(loader.watch(poll_s=0.05))
    try:
        await until(lambda: bool(shop.said), 60)
        await asyncio.sleep(0.3)
        assert len(shop.said) == 1 and "make train" in shop.said[0]
        shop.add(SECOND)
        await until(lambda: shop.state.path.exists() and shop.wanted()[0] == SECOND, 60)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await loader._host.close()


async def test_what_is_there_and_what_is_wanted_is_told(shop: Shop) -> None:
    await shop.load(shop.add(SECOND))
    await shop.load(shop.add(THIRD))
    status, listed = shop.run("status").stdout, shop.run("list").stdout
    assert f"wanted    trinity:{THIRD}" in status and f"previous  trinity:{SECOND}" in status
    marks = {line.split()[5].partition(":")[2]: line.split()[4] for line in listed.splitlines()}
    assert marks == {SECOND: "previous", THIRD: "wanted"}


def test_a_command_that_cannot_be_done_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path / "state"), "--releases", str(tmp_path)]
    for words, said in {
        ("status",): "nothing was loaded yet",
        ("upgrade",): "there are load, list, memory, rollback and status",
        ("rollback",): "there is nothing to go back to",
        ("load",): "no release yet in",
        ("memory",): "no release yet in",
        ("load", "--engine", "openai"): "loads its own models",
        ("load", str(tmp_path / "r.zip")): "no release yet in",
    }.items():
        assert cli.main([*words, *state]) == (0 if words == ("status",) else 2)
        told = "".join(capsys.readouterr())
        assert said in told and told.count("\n") == 1
    assert cli.main(["--help"]) == 0 and "usage:" in capsys.readouterr().out
