"""The order, the keys, and one whole way of preset `tiny` in this process."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from trainer import cards, pipeline
from trainer.artifacts import Hashes, read_label
from trainer.config import Config, load
from trainer.errors import DataError, EditedError, MachineError, ModelError, StaleError

ROOT = Path(__file__).parents[2]


def tiny(directory: Path, *settings: str) -> Config:
    return load("tiny", [f"paths.output={directory / 'output'}", f"paths.cache={directory / 'cache'}", "run.fresh=false", *settings])


def keys(directory: Path, *settings: str) -> dict[str, str]:
    labels = pipeline._labels(tiny(directory, *settings), "report", Hashes(directory / "hashes.json"))
    return {name: label.key for name, label in labels.items()}


def test_the_whole_way_leaves_a_release_and_current(whole: Path) -> None:
    current = whole / "output" / "gguf" / "current"
    manifest = json.loads((current / "manifest.json").read_text())
    assert (current / manifest["files"]["gguf"]["path"]).stat().st_size == manifest["files"]["gguf"]["num_bytes"]
    assert (whole / "output" / "runs" / "tiny" / "report" / "report.html").is_file()
    assert (whole / "output" / "runs" / "tiny" / "train" / "adapter" / "adapter_config.json").is_file()
    assert not list((whole / "output").rglob("*.partial"))


def test_a_second_run_does_nothing(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "output").rglob("*") if path.is_file()}
    pipeline.run(tiny(whole), "report", None)
    assert {path: path.stat().st_mtime_ns for path in (whole / "output").rglob("*") if path.is_file()} == before
    said = capsys.readouterr().out
    assert said.count("up to date") == len(pipeline.order("report"))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("data.valid_fraction=0.2", {"prepare", "train", "evaluate", "export", "verify", "release", "report"}),
        ("adapter.rank=8", {"train", "evaluate", "export", "verify", "release", "report"}),
        ("evaluate.max_records=5", {"evaluate", "verify", "release", "report"}),
        ("export.sampling.top_k=5", {"export", "verify", "release", "report"}),
        ("export.checkpoint=last", {"evaluate", "export", "verify", "release", "report"}),
        ("verify.max_kl_nats=2.0", {"verify", "release", "report"}),
        ("checkpoint.keep=5", set()),
        ("plan.card=L4", set()),
    ],
)
def test_a_change_repeats_exactly_the_descendants(whole: Path, change: str, again: set[str]) -> None:
    before, after = keys(whole), keys(whole, change)
    assert {name for name in before if before[name] != after[name]} == again


def test_a_changed_record_repeats_everything_and_a_moved_file_nothing(whole: Path) -> None:
    moved = whole / "moved.jsonl"
    shutil.copy(ROOT / "data" / "sample.jsonl", moved)
    assert keys(whole) == keys(whole, f"data.path={moved}")
    moved.write_text(moved.read_text().replace("* * *", "* * 1", 1))
    assert all(key != keys(whole)[name] for name, key in keys(whole, f"data.path={moved}").items())


def test_a_train_under_another_key_is_refused_with_the_difference(whole: Path) -> None:
    with pytest.raises(StaleError, match=r"adapter\.rank: 4 -> 8") as caught:
        pipeline.run(tiny(whole, "adapter.rank=8"), "report", None)
    assert "run.fresh=true" in str(caught.value) and "run.name" in str(caught.value)
    assert read_label(whole / "output" / "runs" / "tiny" / "train") is not None


def test_an_edited_gguf_is_refused_before_anything_is_built_on_it(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    gguf = next((copy / "output" / "runs" / "tiny" / "export").glob("*.gguf"))
    data = bytearray(gguf.read_bytes())
    data[len(data) // 2] ^= 1
    gguf.write_bytes(data)
    with pytest.raises(EditedError, match=gguf.name):
        pipeline.run(tiny(copy), "report", None)


def test_a_missing_data_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json: no such file.*DATA=FILE"):
        pipeline.run(tiny(tmp_path, "data.path=data/dataset.json"), "prepare", None)


def test_a_missing_base_model_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        pipeline.run(tiny(tmp_path, f"model.name={tmp_path}/nowhere"), "train", None)


@pytest.mark.skipif(cards.count() > 0, reason="this machine has a card")
def test_no_card_is_said_before_anything_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="make demo"):
        pipeline.run(load("gemma3-12b-t4", [f"paths.output={tmp_path}", "data.path=data/sample.jsonl"]), "report", None)


@pytest.mark.parametrize("stage", ["evaluate", "export", "verify", "release", "report"])
def test_after_train_nobody_reads_how_it_was_to_be_trained(stage: str) -> None:
    """A rung may have changed rank or context: only TrainFacts and adapter_config.json know (DESIGN.md, "As trained")."""
    tree = ast.parse((ROOT / "trainer" / "stages" / f"{stage}.py").read_text())
    read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {name for name in read if name.startswith(("cfg.adapter", "cfg.train"))}
