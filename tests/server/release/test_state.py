from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server import manifest
from server.errors import ReleaseError
from server.release.state import STALE_S, Entry, State, Wanted
from tests.server.real import ROOT
from tests.server.scripted import small_release


def entry(releases: Path, name: str) -> Entry:
    release = manifest.read(small_release(releases, name))
    return Entry(directory=release.directory, digest="d", manifest=release.manifest, probes=release.probes[:1])


@pytest.fixture
def state(tmp_path: Path) -> State:
    (tmp_path / "state").mkdir()
    return State(tmp_path / "state")


def test_what_was_written_is_read_and_is_the_release_as_it_was_loaded(tmp_path: Path, state: State) -> None:
    assert state.read() is None and state.stamp() is None
    wanted = Wanted(engine="ollama", live=entry(tmp_path, "b-0123456789ab"), previous=entry(tmp_path, "a-0123456789ab"), rolled_back="c")
    state.write(wanted)
    assert state.read() == wanted
    assert wanted.live.release.model == "trinity:b-0123456789ab"
    assert wanted.live.release.gguf == tmp_path / "b-0123456789ab" / "model.gguf"


def test_another_wanted_release_is_another_file(tmp_path: Path, state: State) -> None:
    """A reader that has the old file open keeps the old one whole."""
    state.write(Wanted(engine="ollama", live=entry(tmp_path, "a-0123456789ab")))
    before = state.stamp()
    with state.path.open("rb") as opened:
        state.write(Wanted(engine="ollama", live=entry(tmp_path, "b-0123456789ab")))
        assert b"a-0123456789ab" in opened.read()
    assert state.stamp() != before
    assert [path.name for path in state.directory.iterdir()] == ["release.json"]


def test_a_torn_file_is_one_line_with_the_remedy(state: State) -> None:
    state.path.write_text('{"engine": "ollama", "live": {')
    with pytest.raises(ReleaseError, match=r"release.json: .*delete it and run `python -m server release load`"):
        state.read()


def test_a_mark_counts_while_it_is_fresh_and_is_gone_after_the_block(state: State) -> None:
    assert not state.loading()
    with state.mark() as renew:
        assert state.loading()
        [mark] = state.directory.iterdir()
        long_ago = time.time() - STALE_S - 1
        os.utime(mark, (long_ago, long_ago))
        assert not state.loading(), "a loader that was killed holds nobody up"
        renew()
        assert state.loading()
    assert not state.loading()


HOLDER = """
import sys, time
from pathlib import Path
from server.release.state import State
with State(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_once_and_goes_with_its_process_however_that_dies(state: State) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(state.directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), state.lock():
            pass
        holder.kill()
        holder.wait()
        with state.lock():
            pass
