from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import ReleaseError
from server.manifest import Release
from server.release import cli, gguf, space
from server.release.gguf import Shape
from server.release.state import Entry, State, Wanted

TWELVE = Shape(num_layers=48, num_kv_heads=8, key_length=256, value_length=256, window=1024, vocab_size=262_208)


def test_a_real_header_is_read_without_its_vocabulary(release: Release) -> None:
    shape = gguf.read(release.gguf)
    assert shape == Shape(num_layers=18, num_kv_heads=1, key_length=256, value_length=256, window=512, vocab_size=262_144)


def test_local_layers_keep_their_window_and_global_ones_the_context_of_every_slot() -> None:
    row = 8 * 512 * 2
    assert TWELVE.cache_bytes(4096, 1) == row * (8 * 4096 + 40 * (1024 + 512))
    assert TWELVE.cache_bytes(4096, 2) == row * (8 * 8192 + 40 * (2048 + 512))
    assert TWELVE.cache_bytes(256, 1) == row * 48 * 256
    assert replace(TWELVE, window=0).cache_bytes(4096, 1) == row * 48 * 4096


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGML" + bytes(100), b"GGUF" + struct.pack("<IQQ", 9, 1, 1), b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 60)],
)
def test_what_is_no_gguf_is_refused_before_it_travels(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ReleaseError, match="not a whole GGUF"):
        gguf.read(path)


def test_a_header_that_lacks_its_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ReleaseError, match=r"header lacks 'general\.architecture'"):
        gguf.read(path)


def test_a_disk_that_is_too_small_is_one_line_that_says_for_what(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    half = free // 2 + 1
    writes = [space.Written("unpacked", tmp_path / "state" / "releases", half), space.Written("Ollama's copy", tmp_path, half)]
    with pytest.raises(
        ReleaseError, match=r"trinity:x does not fit on disk beside the release before it: .* free and .* are needed"
    ) as caught:
        space.check_disk("trinity:x", writes)
    assert "unpacked" in str(caught.value) and "Ollama's copy" in str(caught.value) and "\n" not in str(caught.value)
    space.check_disk("trinity:x", writes[:1])
    space.check_disk("trinity:x", [])


def test_a_containers_memory_is_the_models_and_room_for_ollama(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--releases", str(release.directory)]) == 0
    needed = space.need(release, 1)
    assert int(capsys.readouterr().out) == needed.total + space.BESIDE_BYTES
    assert needed.weights == release.gguf.stat().st_size and needed.total == sum(needed)


def test_the_limit_is_enough_for_the_wanted_release_where_the_newest_is_smaller(
    release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = replace(
        release, manifest=release.manifest.model_copy(update={"prompt": release.manifest.prompt.model_copy(update={"num_ctx": 8192})})
    )
    entry = Entry(directory=larger.directory, digest="", manifest=larger.manifest, probes=())
    State(tmp_path).write(Wanted(engine="ollama", live=entry))
    assert cli.main(["memory", "--releases", str(release.directory), "--state", str(tmp_path)]) == 0
    assert (
        int(capsys.readouterr().out) == space.need(larger, 1).total + space.BESIDE_BYTES > space.need(release, 1).total + space.BESIDE_BYTES
    )


def test_memory_that_does_not_suffice_is_one_line_with_every_term(release: Release) -> None:
    shape = gguf.read(release.gguf)
    needed = release.gguf.stat().st_size + shape.cache_bytes(256, 2) + shape.batch_bytes
    space.check_memory(release, 2, needed)
    space.check_memory(release, 2, None)
    with pytest.raises(
        ReleaseError, match=r"needs 0\.8 GB of the engine's memory \(weights 0\.3 GB, 2 x 256 tokens of context 9\.4 MB, a batch"
    ):
        space.check_memory(release, 2, needed - 1)
    assert 0 < space.machine_memory() < 1 << 50
