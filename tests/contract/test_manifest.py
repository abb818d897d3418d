"""The golden manifest, read by the strict writer's side and by the tolerant reader's side."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.manifest import Manifest as Tolerant
from server.manifest import Probe as ReadProbe
from trainer.manifest import Manifest as Strict
from trainer.manifest import Message, Probe

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
    with pytest.raises(ValidationError, match="Extra inputs"):
        Strict.model_validate_json(text)


def test_a_probe_crosses_unchanged() -> None:
    probe = Probe(messages=(Message(role="user", content="ü\u2028"),), prompt="p", prompt_ids=(2, 105), answer="a\n")
    assert ReadProbe.model_validate_json(probe.model_dump_json()).model_dump() == probe.model_dump()
