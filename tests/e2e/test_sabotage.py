"""The demo's own adapter, merged wrongly on purpose: the real model's verify must refuse it. The tiny model's tests do all three sabotages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer import artifacts, worker
from trainer.config import Config, load
from trainer.errors import RefusedError
from trainer.facts import ExportFacts, VerifyFacts

ROOT = Path(__file__).parents[2]
RUN = ROOT / "output" / "runs" / "gemma3-270m-cpu"


@pytest.fixture(scope="module")
def cfg() -> Config:
    if not (RUN / "verify" / artifacts.RECORD).is_file():
        message = f"no demo in {RUN}: run `make demo` first"
        if os.environ.get("TRINITY_E2E") == "require":
            pytest.fail(message)
        pytest.skip(message)
    return load("gemma3-270m-cpu", [f"paths.output={ROOT / 'output'}", f"paths.cache={ROOT / '.cache'}", "verify.minutes=0.5"])


def verified(cfg: Config, directory: Path, tamper: Callable[[dict[str, Any]], None]) -> VerifyFacts:
    """Export and verify the demo's adapter after `tamper` changed its adapter_config.json."""
    train, export = directory / "train", directory / "export"
    shutil.copytree(RUN / "train", train)
    for folder in ("best", "adapter"):
        file = train / folder / "adapter_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        tamper(settings)
        file.write_text(json.dumps(settings), encoding="utf-8")
    label = artifacts.Label(stage="export", version=0, sections={}, sources={}, inputs={})
    inputs = {"prepare": RUN / "prepare", "train": train, "evaluate": RUN / "evaluate", "export": export}
    with artifacts.publish(export, label, artifacts.Hashes(directory / "hashes.json")) as draft:
        draft.facts = worker.Job(stage="export", config=cfg, inputs=inputs, out=draft.path).run()
    assert isinstance(draft.facts, ExportFacts)
    out = directory / "verify"
    out.mkdir()
    return worker.in_process(worker.Job(stage="verify", config=cfg, inputs=inputs, out=out), VerifyFacts)


@pytest.mark.e2e
def test_alpha_over_r_instead_of_its_root_is_refused(cfg: Config, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="kl:"):
        verified(cfg, tmp_path, lambda settings: settings.update(use_rslora=False))


@pytest.mark.e2e
def test_the_same_way_without_a_sabotage_passes(cfg: Config, tmp_path: Path) -> None:
    assert verified(cfg, tmp_path, lambda settings: None).verified
