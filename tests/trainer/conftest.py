"""A tiny run for tests that need a model: random:tiny, its cache made once, and prepared records in the contract's form."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trainer import pipeline
from trainer.config import Config, load
from trainer.facts import Facts

WORDS = ["every", "day", "at", "noon", "minute", "hour", "five", "two", "monday", "march", "night"]


class Published(NamedTuple):
    """Inputs by hand: directories, and facts where a test needs them."""

    directories: dict[str, Path]
    known: dict[type[Facts], Facts]

    def path(self, stage: str) -> Path:
        return self.directories[stage]

    def facts(self, kind: type[Any]) -> Any:
        return self.known[kind]


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """paths.cache that all tests share: the tiny model and its NF4 state are made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_config(tiny_cache: Path) -> Callable[..., Config]:
    """Preset tiny with overrides."""
    return lambda *overrides: load("tiny", [f"paths.cache={tiny_cache}", *overrides])


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `tiny` went the whole way once: output/ and cache/. Read only."""
    directory = tmp_path_factory.mktemp("whole")
    settings = [f"paths.output={directory / 'output'}", f"paths.cache={directory / 'cache'}", "run.fresh=false"]
    pipeline.run(load("tiny", settings), "report", None)
    return directory


@pytest.fixture(scope="session")
def tiny_prepared(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prepare leaves: 24 records to train on and 8 held out; the answer repeats the question's words."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # two busy cores are slower than one at this size
    from trainer import tokenizer
    from trainer.backends import hub
    from trainer.dataset import records, template

    cfg = tiny_config()
    made = tokenizer.load(hub.tokenizer_json(cfg.model, cfg.paths.cache))
    folder = tmp_path_factory.mktemp("prepare")
    made.save(str(folder / "tokenizer.json"))
    choose = random.Random(7)
    for name, count in (("train", 24), ("valid", 8)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for line in range(count):
                text = " ".join(choose.choices(WORDS, k=choose.randint(2, 6)))
                messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[:8].strip()}]
                ids, spans = template.encode(made, messages)
                tree = {"id": records.prompt_id(messages), "line": line + 1, "messages": messages, "ids": ids, "spans": spans}
                file.write(json.dumps(tree) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_inputs(tiny_prepared: Path) -> Published:
    return Published({"prepare": tiny_prepared}, {})
