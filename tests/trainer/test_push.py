"""A push to a hub on this machine, through the hub's own client: what arrives, what is sent once, and one clear line for what goes wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from server import manifest as served
from tests.local_site import serving, url
from trainer import model_card, push
from trainer.config import load
from trainer.errors import ArtifactError, PushError
from trainer.manifest import Waived

ROOT = Path(__file__).parents[2]
TOKEN = "hf_thisTokenOpensTheDoor"
READER = "hf_thisTokenOnlyReads"


@dataclass
class Site:
    """What of the hub's API a push meets: repositories, uploads of large files (LFS), one commit."""

    url: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    """Name -> private."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> what its last commit holds."""
    uploads: int = 0
    breaks_at: str = ""
    """Requests whose path holds this are answered with 500."""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if path.startswith("/lfs/"):  # a storage of its own: the address is the right
            self.uploads += 1
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}
        return self._refusal(method, path, token) or self._api(path, body)

    def _refusal(self, method: str, path: str, token: str) -> tuple[int, Any] | None:
        if self.breaks_at and self.breaks_at in path:
            return 500, {"error": "out of order"}
        if token not in {TOKEN, READER}:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if token == READER and method == "POST" and "validate" not in path:
            return 403, {"error": "you need a token that may write"}
        return None

    def _api(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.removeprefix("/api/models/").lstrip("/").split("/")[:2]).removesuffix(".git")
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._of(name, path, body)

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, wanted.get("visibility") == "private")
        return status, {"url": f"{self.url}/{name}"}

    def _of(self, name: str, path: str, body: bytes) -> tuple[int, Any]:
        if "/preupload/" in path:
            return 200, {"files": [self._mode(item) for item in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._action(item) for item in json.loads(body)["objects"]]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            self.files[name] = {line["value"]["path"]: self._content(line) for line in lines if line["key"] != "header"}
            return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}
        return 200, {"id": name, "private": self.repositories[name], "sha": "1" * 40, "siblings": []}

    @staticmethod
    def _mode(item: dict[str, Any]) -> dict[str, Any]:
        large = item["path"].endswith((".gguf", ".safetensors"))
        return {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _action(self, item: dict[str, Any]) -> dict[str, Any]:
        there = item["oid"] in self.stored
        return item if there else {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}

    def _content(self, line: dict[str, Any]) -> bytes:
        value = line["value"]
        return self.stored[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])


@pytest.fixture
def site() -> Iterator[Site]:
    here = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply()

        def do_POST(self) -> None:
            self._reply()

        def do_PUT(self) -> None:
            self._reply()

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            status, said = here.answer(self.command, self.path, (self.headers.get("Authorization") or "").removeprefix("Bearer "), body)
            data = json.dumps(said).encode()
            self.send_response(status)
            if "error" in said:
                self.send_header("X-Error-Message", said["error"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return data

    with serving(Handler) as server:
        here.url = url(server)
        yield here


@dataclass
class Pushing:
    whole: Path
    endpoint: str
    home: Path

    def run(self, *words: str, token: str = TOKEN) -> tuple[int, str]:
        """Exit code and all that was said; a token is never in it."""
        cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        more = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        settings = [f"paths.output={self.whole / 'output'}", f"paths.cache={self.whole / 'cache'}"]
        command = [sys.executable, "-m", "trainer", "push", *words, "--preset", "tiny"]
        command += [part for setting in settings for part in ("--set", setting)]
        done = subprocess.run(command, cwd=ROOT, env=cleared | more, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        assert not token or token not in said
        return done.returncode, said


@pytest.fixture
def pushing(whole: Path, site: Site, tmp_path: Path) -> Pushing:
    return Pushing(whole, site.url, tmp_path)


def test_a_release_arrives_whole_and_the_loader_takes_what_lies_on_the_hub(pushing: Pushing, site: Site, tmp_path: Path) -> None:
    code, said = pushing.run("ada/cron")
    assert code == 0, said
    assert said.splitlines()[0].startswith("push: ada/cron (private), ") and f"{site.url}/ada/cron" in said
    assert site.repositories == {"ada/cron": True}
    for name, content in site.files["ada/cron"].items():
        (tmp_path / name).write_bytes(content)
    release = served.read(tmp_path)
    assert len(release.probes) >= 3
    assert hashlib.sha256(release.gguf.read_bytes()).hexdigest() == release.manifest.files["gguf"].sha256
    parameters = json.loads(site.files["ada/cron"]["params"])
    assert parameters["stop"] == ["<end_of_turn>"] and parameters["num_ctx"] == 512
    assert site.files["ada/cron"]["template"].decode() in site.files["ada/cron"]["Modelfile"].decode()
    assert b"Gemma Terms of Use" in site.files["ada/cron"]["LICENSES.txt"]


def test_a_push_that_broke_off_sends_no_large_file_twice(pushing: Pushing, site: Site) -> None:
    site.breaks_at = "/commit/"
    code, said = pushing.run("ada/cron")
    assert code == 2 and "500" in said and "run the same command again" in said
    assert site.uploads == 1 and "ada/cron" not in site.files
    site.breaks_at = ""
    assert pushing.run("ada/cron")[0] == 0
    assert site.uploads == 1 and "manifest.json" in site.files["ada/cron"]


def test_a_dry_run_lists_and_asks_nobody(pushing: Pushing, site: Site) -> None:
    code, said = pushing.run("ada/cron", "--dry-run", token="")
    assert code == 0 and "trinity-q4_k_m.gguf" in said and "probes.jsonl" in said
    assert not site.repositories


def test_a_private_push_never_lands_in_a_public_repository(pushing: Pushing, site: Site) -> None:
    site.repositories["ada/cron"] = False
    code, said = pushing.run("ada/cron")
    assert code == 2 and "PUBLIC=1" in said and not site.files
    code, said = pushing.run("ada/cron", "--public")
    assert code == 0 and "held-out questions" in said and "manifest.json" in site.files["ada/cron"]
    assert "ask you to give a copy of them along" in said


def test_a_copy_of_gemmas_terms_goes_along_where_one_is_named(pushing: Pushing, site: Site, tmp_path: Path) -> None:
    terms = tmp_path / "terms.txt"
    code, said = pushing.run("ada/cron", "--terms", str(terms))
    assert code == 2 and "no such file" in said and not site.files
    terms.write_text("as Google wrote them", encoding="utf-8")
    code, said = pushing.run("ada/cron", "--public", "--terms", str(terms))
    assert code == 0 and "give a copy of them along" not in said
    assert site.files["ada/cron"]["GEMMA_TERMS.txt"] == b"as Google wrote them"


def test_what_is_said_of_the_model_is_true_of_what_is_pushed(whole: Path) -> None:
    said: dict[model_card.What, tuple[str, str]] = {
        "gguf": ("merged and quantised", "an adapter that"),
        "adapter": ("an adapter that was trained on Gemma", "merged"),
    }
    for what, (true, false) in said.items():
        _, files = contents(whole, what)
        for name in ("README.md", "LICENSES.txt"):
            text = files[name]
            assert isinstance(text, bytes)
            told = text.decode().partition("## Licence")[2] or text.decode()
            assert true in told and false not in told and "ai.google.dev/gemma/terms" in told, (what, name)


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("", "no token of the hub"),
        ("hf_revoked", "does not take the token"),
        (READER, "must be one that may write"),
        ("hf_a b\x7f", "holds blanks"),
    ],
)
def test_a_token_that_opens_nothing_is_one_line_with_the_remedy(pushing: Pushing, site: Site, token: str, told: str) -> None:
    code, said = pushing.run("ada/cron", token=token)
    assert code == 2 and told in said and "huggingface.co/settings/tokens" in said
    assert not site.files


def test_a_hub_out_of_reach_is_one_line(pushing: Pushing, site: Site) -> None:
    pushing.endpoint = "http://127.0.0.1:9"
    code, said = pushing.run("ada/cron")
    assert code == 2 and "cannot be reached" in said


def test_names_and_runs_that_are_not_there_are_told_before_the_hub_is_asked(whole: Path) -> None:
    settings = ["--preset", "tiny", "--set", f"paths.output={whole / 'output'}", "--set", f"paths.cache={whole / 'cache'}"]
    for name in ("cron", "ada/cron/x", "ada/-cron", "ada/cr on"):
        with pytest.raises(PushError, match=name):
            push.main([name, *settings])
    with pytest.raises(ArtifactError, match="make train"):
        push.main(["ada/cron", *settings, "--set", "run.name=never"])


def contents(whole: Path, what: model_card.What) -> tuple[model_card.Run, push.Files]:
    return push.contents(load("tiny", [f"paths.output={whole / 'output'}", f"paths.cache={whole / 'cache'}"]), "ada/cron", what)


def test_the_card_holds_base_licence_and_every_figure(whole: Path) -> None:
    run, files = contents(whole, "gguf")
    run = run._replace(
        manifest=run.manifest.model_copy(update={"base": run.manifest.base.model_copy(update={"name": "unsloth/gemma-3-12b-it"})})
    )
    card = model_card.card(run, "ada/cron", "gguf")
    head = card.split("---")[1]
    assert 'license: "gemma"' in head and 'base_model: "unsloth/gemma-3-12b-it"' in head and '"dora"' in head
    scores, parity = run.manifest.scores, run.manifest.parity
    assert f"{scores.loss_base:.3f} | {scores.loss_tuned:.3f}" in card and f"{parity.kl_nats:.4f} nats" in card
    assert f"{run.prepared.num_train:,}" in card and "ollama run hf.co/ada/cron" in card and "ai.google.dev/gemma/terms" in card
    probes = (whole / "output" / "gguf" / "current" / "probes.jsonl").read_text(encoding="utf-8")
    assert json.loads(probes.splitlines()[0])["messages"][0]["content"] not in card
    assert set(files) >= {"README.md", "LICENSES.txt", "manifest.json", "Modelfile", "probes.jsonl"}


def test_the_card_says_what_was_waived_and_names_no_base_that_the_hub_has_not(whole: Path) -> None:
    run, _ = contents(whole, "gguf")
    waived = run.manifest.parity.model_copy(update={"verified": False, "waived": (Waived(link="kl", message="0.5 nats (limit 0.1)"),)})
    card = model_card.card(run._replace(manifest=run.manifest.model_copy(update={"parity": waived})), "ada/cron", "gguf")
    assert "**Not verified.**" in card and "- 0.5 nats (limit 0.1)" in card
    assert "base_model" not in card


def test_the_cards_own_lines_load_the_adapter_on_the_hubs_layout(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card's Python as a user would paste it, with directories in place of names on the hub and few tokens."""
    from trainer.backends import hub

    run, files = contents(whole, "adapter")
    for name, source in files.items():
        (tmp_path / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    assert set(files) == {"README.md", "LICENSES.txt", "adapter_config.json", "adapter_model.safetensors"}
    cfg = load("tiny", [f"paths.cache={whole / 'cache'}"])
    code = re.findall(r"```python\n(.*?)```", model_card.card(run, str(tmp_path), "adapter"), flags=re.DOTALL)[0]
    code = code.replace("THE BASE MODEL'S DIRECTORY", str(hub.weights(cfg.model, cfg.paths.cache))).replace("tokens=64", "tokens=2")
    (tmp_path / "pasted.py").write_text(code, encoding="utf-8")
    model = runpy.run_path(str(tmp_path / "pasted.py"))["model"]
    trained = [part for name, part in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 14 and all(part.abs().sum() > 0 for part in trained)
    assert "<start_of_turn>model" in capsys.readouterr().out
