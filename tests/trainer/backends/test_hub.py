"""Where models come from: four kinds, one directory each, and one clear line when one cannot be had."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.local_site import serving, url
from trainer import random_weights, shards, tokenizer
from trainer.backends import hub
from trainer.config import Model
from trainer.errors import ModelError
from trainer.gemma3 import SIZES

COMMIT = "1234567890abcdef1234567890abcdef12345678"


def model(name: str, revision: str = "") -> Model:
    return Model(name=name, revision=revision, backend="transformers", device="cpu", dtype="float32")


@dataclass
class Site:
    """A hub on this machine that serves one directory as `someone/gemma-tiny` and knows a gated model."""

    directory: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        if "/gated/" in path:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}"
        if "/someone/gemma-tiny" not in path:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "/revision/" in path and not path.endswith(("/main", COMMIT)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if path.startswith("/api/models/someone/gemma-tiny/tree/"):
            return 200, {"Content-Type": "application/json"}, json.dumps([self._leaf(file) for file in self._files()]).encode()
        if path.startswith("/api/models/someone/gemma-tiny"):
            siblings = [{"rfilename": file.name} for file in self._files()]
            info = {"id": "someone/gemma-tiny", "sha": COMMIT, "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        return self._file(self.directory / path.rpartition("/")[2])

    def _files(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.is_file())

    def _leaf(self, path: Path) -> dict[str, str | int]:
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _digest(path)[:40]}

    def _file(self, path: Path) -> tuple[int, dict[str, str], bytes]:
        if not path.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        return 200, {"ETag": f'"{_digest(path)[:40]}"', "X-Repo-Commit": COMMIT}, path.read_bytes()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    here = Site(tmp_path / "served")
    assert random_weights.main([str(here.directory)]) == 0
    (here.directory / "README.md").write_text("not wanted")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._reply(body=False)

        def do_GET(self) -> None:
            self._reply(body=True)

        def _reply(self, *, body: bool) -> None:
            here.requests.append(self.path)
            status, headers, data = here.answer(self.path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    with serving(Handler) as server:
        here.url = url(server)
        yield here


def test_a_hub_model_arrives_whole_and_a_second_start_asks_nobody(site: Site, tmp_path: Path) -> None:
    found = hub.weights(model("someone/gemma-tiny"), tmp_path / "cache", endpoint=site.url)
    assert found.is_relative_to(tmp_path / "cache") and found.name == COMMIT
    assert sorted(path.name for path in found.iterdir()) == sorted(
        path.name for path in site.directory.iterdir() if path.name != "README.md"
    )
    assert all((found / path.name).read_bytes() == (site.directory / path.name).read_bytes() for path in shards.files(site.directory))
    assert hub.revision(model("someone/gemma-tiny"), tmp_path / "cache") == COMMIT
    site.requests.clear()
    assert hub.weights(model("someone/gemma-tiny"), tmp_path / "cache", endpoint=site.url) == found
    assert hub.size(model("someone/gemma-tiny"), tmp_path / "cache", endpoint=site.url) == SIZES["tiny"]
    assert not site.requests


def test_tokenizer_and_size_come_without_the_weights(site: Site, tmp_path: Path) -> None:
    path = hub.tokenizer_json(model("someone/gemma-tiny"), tmp_path / "cache", endpoint=site.url)
    assert path.read_bytes() == (site.directory / "tokenizer.json").read_bytes()
    assert hub.size(model("someone/gemma-tiny"), tmp_path / "cache", endpoint=site.url) == SIZES["tiny"]
    assert not any(path.endswith(".safetensors") for path in site.requests)


def test_a_download_that_was_cut_goes_on(site: Site, tmp_path: Path) -> None:
    found = hub.weights(model("someone/gemma-tiny"), tmp_path / "cache", endpoint=site.url)
    shard = shards.files(found)[1]
    shard.resolve().unlink()
    shard.unlink()
    site.requests.clear()
    assert hub.weights(model("someone/gemma-tiny"), tmp_path / "cache", endpoint=site.url) == found
    assert shard.is_file() and {path.rpartition("/")[2] for path in site.requests if "/resolve/" in path} == {shard.name}


def test_a_pinned_revision_is_the_one_that_is_asked_for(site: Site, tmp_path: Path) -> None:
    assert hub.weights(model("someone/gemma-tiny", COMMIT), tmp_path / "cache", endpoint=site.url).name == COMMIT
    with pytest.raises(ModelError, match=r"model\.revision=fedcba: .*has no such commit"):
        hub.weights(model("someone/gemma-tiny", "fedcba"), tmp_path / "cache", endpoint=site.url)


def test_a_gated_model_a_typo_and_no_network_are_three_clear_lines(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.name=gated/gemma: gated; accept its licence.*unsloth/gemma-3-12b-it"):
        hub.weights(model("gated/gemma"), tmp_path, endpoint=site.url)
    with pytest.raises(ModelError, match=r"^model\.name=someone/gema: no such public model \(a typo"):
        hub.weights(model("someone/gema"), tmp_path, endpoint=site.url)
    with pytest.raises(ModelError, match=r"^model\.name=someone/gemma-tiny: the hub cannot be reached .*what arrived is kept"):
        hub.weights(model("someone/gemma-tiny"), tmp_path, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(_refusal(tmp_path))


def _refusal(tmp_path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        hub.tokenizer_json(model("someone/gemma-tiny"), tmp_path, endpoint="http://127.0.0.1:9")
    return caught.value


def test_a_hub_model_without_a_tokenizer_is_refused(site: Site, tmp_path: Path) -> None:
    (site.directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"a file that every model has is not in it"):
        hub.tokenizer_json(model("someone/gemma-tiny"), tmp_path, endpoint=site.url)


def test_released_sizes_are_known_without_asking(tmp_path: Path) -> None:
    assert hub.size(model("unsloth/gemma-3-12b-it"), tmp_path) == SIZES["12b"]
    assert hub.size(model("google/gemma-3-27b-pt"), tmp_path) == SIZES["27b"]
    assert not list(tmp_path.iterdir())


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert random_weights.main([str(tmp_path / "mine")]) == 0
    mine = model(str(tmp_path / "mine"))
    assert hub.weights(mine, tmp_path / "cache") == tmp_path / "mine"
    assert hub.tokenizer_json(mine, tmp_path / "cache") == tmp_path / "mine" / "tokenizer.json"
    assert hub.size(mine, tmp_path / "cache") == SIZES["tiny"]
    assert not (tmp_path / "cache").exists()


def test_a_directory_that_lacks_something_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.name=\./nowhere: no such directory.*embedded:gemma-3-270m"):
        hub.weights(model("./nowhere"), tmp_path)
    assert random_weights.main([str(tmp_path / "mine")]) == 0
    shard = shards.files(tmp_path / "mine")[0]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}: .*not there"):
        hub.weights(model(str(tmp_path / "mine")), tmp_path)
    (tmp_path / "mine" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: not there"):
        hub.weights(model(str(tmp_path / "mine")), tmp_path)


def test_the_random_model_is_in_the_hub_s_layout_and_made_once(tmp_path: Path) -> None:
    found = hub.weights(model("random:tiny"), tmp_path)
    assert json.loads((found / "config.json").read_text())["architectures"] == ["Gemma3ForConditionalGeneration"]
    times = {path.name: path.stat().st_mtime_ns for path in found.iterdir()}
    assert hub.weights(model("random:tiny"), tmp_path) == found
    assert {path.name: path.stat().st_mtime_ns for path in found.iterdir()} == times
    assert hub.tokenizer_json(model("random:tiny"), tmp_path) == found / "tokenizer.json"


def test_the_identity_of_a_directory_changes_with_its_files_and_forgets_deleted_ones(tmp_path: Path) -> None:
    assert random_weights.main([str(tmp_path / "mine")]) == 0
    mine = model(str(tmp_path / "mine"))
    before = hub.identity(mine, tmp_path)
    shard = shards.files(tmp_path / "mine")[0]
    shard.write_bytes(shard.read_bytes())
    after = hub.identity(mine, tmp_path)
    assert {name for name in before if before[name] != after[name]} == {shard.name}
    shard.unlink()
    assert hub.identity(mine, tmp_path).keys() == before.keys() - {shard.name}


def test_autotokenizer_reads_the_embedded_model_s_tokenizer_right(tmp_path: Path) -> None:
    """Other reading of the same vocabulary tears turn markers apart, so the ids of a turn are written out here."""
    from transformers import AutoTokenizer

    path = hub.tokenizer_json(model(hub.EMBEDDED), tmp_path)
    config = SIZES["270m"].to_config("float32")
    (path.parent / "config.json").write_text(json.dumps(config))
    theirs, ours = AutoTokenizer.from_pretrained(path.parent), tokenizer.load(path)
    text = "<start_of_turn>user\nEvery day at noon<end_of_turn>\n"
    assert theirs(text)["input_ids"] == ours.encode(text).ids == [2, 105, 2364, 107, 13111, 1719, 657, 37170, 106, 107]
    for text in ("  naïve \t 漢字 \U0001f600\n\n\n", "*/5 * * * 1-5", "<eos><end_of_turn>x", "İstanbul ½ \x07"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)
