"""export: what is refused before a byte is written, and what lies there afterwards."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from trainer.errors import ArtifactError, MachineError, ModelError
from trainer.facts import TrainFacts
from trainer.stages import export


def test_the_facts_are_the_files(chain: Any) -> None:
    path = chain.export / chain.facts.gguf
    assert path.name == "trinity-q4_k_m.gguf"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == chain.facts.gguf_sha256
    assert path.stat().st_size == chain.facts.gguf_bytes
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]
    assert {kind: kinds.count(kind) for kind in kinds} == chain.facts.types and len(kinds) == chain.facts.num_tensors
    assert chain.facts.checkpoint_step == 4 and len(chain.facts.base_sha256) == 64


def test_the_modelfile_names_the_gguf_and_closes_the_template_without_a_newline(chain: Any) -> None:
    text = (chain.export / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./trinity-q4_k_m.gguf\n")
    assert '{{- end }}{{- end }}"""\n' in text
    assert 'PARAMETER stop "<end_of_turn>"\n' in text and "PARAMETER num_ctx 512\n" in text


def test_the_adapter_alone_says_what_was_trained(chain: Any, tmp_path: Path) -> None:
    other = chain.cfg.model_copy(
        update={"adapter": chain.cfg.adapter.model_copy(update={"rank": 2, "alpha": 1.0, "rslora": False, "dora": False})}
    )
    assert export.run(other, chain.inputs, tmp_path).gguf_sha256 == chain.facts.gguf_sha256
    read = {node.attr for node in ast.walk(ast.parse(Path(export.__file__).read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)}
    assert not read & {"adapter", "train"}


def test_an_adapter_of_another_base_is_refused_by_name(chain: Any, tmp_path: Path) -> None:
    inputs = with_config(chain, tmp_path, base_model_name_or_path="somebody/else")
    with pytest.raises(ArtifactError, match="the adapter belongs to 'somebody/else', not to 'random:tiny'"):
        export.run(chain.cfg, inputs, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_base_weights_that_were_replaced_since_are_refused(chain: Any, tmp_path: Path) -> None:
    other = chain.inputs.facts(TrainFacts).model_copy(update={"base_sha256": "0" * 64})
    with pytest.raises(ModelError, match="not those that the adapter was trained on"):
        export.run(chain.cfg, chain.inputs._replace(known={**chain.inputs.known, TrainFacts: other}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_room_on_the_disk_is_said_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"the GGUF takes 10{9}\.00 GB, .* GB are free"):
        export._require_room(tmp_path, 10**18)


def with_config(chain: Any, tmp_path: Path, **changes: Any) -> Any:
    train = tmp_path / "train"
    shutil.copytree(chain.inputs.path("train"), train)
    path = train / "best" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return chain.inputs._replace(directories={**chain.inputs.directories, "train": train})
