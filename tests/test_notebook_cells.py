"""Cells of notebooks/colab_t4.ipynb that call a shell, by themselves, with places whose names hold blanks and apostrophes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from trainer.config import load

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "colab_t4.ipynb"
CELLS = {cell["id"]: "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]}


@pytest.fixture
def notebook(tmp_path: Path) -> dict[str, Any]:
    """Its variables after the cells `shell` and `data`, with everything in a folder of somebody called O'Hara."""
    place = tmp_path / "O'Hara's $HOME"
    kept = place / "kept"
    kept.mkdir(parents=True)
    (place / "my records.jsonl").write_text("{}\n", encoding="utf-8")
    names: dict[str, Any] = {"CHECKOUT": place, "KEPT": kept, "DATA": "my records.jsonl", "OUTPUT": str(place / "output")}
    names |= {"PRESET": "tiny", "SETTINGS": "--set train.max_steps=3", "COLAB": False, "Path": Path}
    for cell in ("shell", "data"):
        exec(CELLS[cell], names)  # noqa: S102 - the notebook's own
    return names


def test_the_trainer_gets_the_places_as_they_are_called(notebook: dict[str, Any]) -> None:
    words = shlex.split(notebook["OPTIONS"])
    cfg = load(words[1], words[3::2])
    assert (cfg.data.path, cfg.train.max_steps) == (notebook["data"], 3)
    assert str(cfg.paths.output) == notebook["OUTPUT"]
    assert cfg.checkpoint.mirror == notebook["KEPT"]


def test_one_archive_of_a_run_is_kept_the_newest(notebook: dict[str, Any]) -> None:
    release, kept = notebook["CHECKOUT"] / "output" / "gguf" / "cron-2222", notebook["KEPT"]
    release.mkdir(parents=True)
    (release / "manifest.json").write_text("{}", encoding="utf-8")
    for name in ("cron-1111.tar", "cron-it-3333.tar"):
        (kept / name).write_bytes(b"")
    exec(CELLS["file"], notebook | {"release": release, "run": "cron"})  # noqa: S102
    assert sorted(path.name for path in kept.iterdir()) == ["cron-2222.tar", "cron-it-3333.tar"], "another run's stays"


def test_an_archive_that_could_not_be_written_deletes_none(notebook: dict[str, Any]) -> None:
    kept = notebook["KEPT"]
    (kept / "cron-1111.tar").write_bytes(b"")
    with pytest.raises(RuntimeError, match="exit code"):
        exec(CELLS["file"], notebook | {"release": notebook["CHECKOUT"] / "cron-2222", "run": "cron"})  # noqa: S102
    assert [path.name for path in kept.iterdir()] == ["cron-1111.tar"], "nor does half of one stay"
