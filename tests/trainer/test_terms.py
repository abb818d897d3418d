from __future__ import annotations

from pathlib import Path

import pytest

from trainer import terms
from trainer.config import load


def test_the_base_models_terms_are_shown_once_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load("gemma3-12b-t4", [f"paths.cache={tmp_path / 'cache'}"])
    terms.show_once(cfg)
    shown = capsys.readouterr().out
    assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in shown
    assert "unsloth/gemma-3-12b-it" in shown
    assert len(shown.splitlines()) == 1
    terms.show_once(cfg)
    assert capsys.readouterr().out == ""
    terms.show_once(load("gemma3-12b-t4", [f"paths.cache={tmp_path / 'other'}"]))
    assert capsys.readouterr().out != ""


def test_random_weights_have_no_terms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terms.show_once(load("tiny", [f"paths.cache={tmp_path}"]))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
