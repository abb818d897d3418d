"""The golden manifest, read by the strict writer's side and by the tolerant reader's side."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.manifest import Manifest as Tolerant
from trainer.manifest import Manifest as Strict

HERE = Path(__file__).parent


def test_the_strict_writer_and_the_tolerant_reader_agree_on_the_golden_file() -> None:
    text = (HERE / "manifest.json").read_text(encoding="utf-8")
    written, read = Strict.model_validate_json(text), Tolerant.model_validate_json(text)
    assert read.name == written.name and read.release == written.release
    assert read.prompt.model_dump(mode="json") == written.prompt.model_dump(mode="json")
    assert {name: file.sha256 for name, file in read.files.items()} == {str(name): file.sha256 for name, file in written.files.items()}


def test_the_reader_takes_keys_of_the_future_and_the_writer_does_not() -> None:
    text = (HERE / "manifest_future.json").read_text(encoding="utf-8")
    Tolerant.model_validate_json(text)
    with pytest.raises(ValidationError, match="extra_forbidden|Extra inputs"):
        Strict.model_validate_json(text)
