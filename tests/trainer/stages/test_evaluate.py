"""evaluate: what it leaves is what verify stands on, and the adapter alone says what was trained."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from trainer.config import Config
from trainer.errors import ModelError
from trainer.facts import EvaluateFacts, TrainFacts
from trainer.stages import evaluate, train

Make = Callable[..., Config]


class Run(NamedTuple):
    inputs: Any
    out: Path
    facts: EvaluateFacts
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tiny_config: Make, tiny_inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    trained, out = tmp_path_factory.mktemp("train"), tmp_path_factory.mktemp("evaluate")
    measured = train.run(tiny_config("train.learning_rate=2e-2"), tiny_inputs, trained)
    inputs = tiny_inputs._replace(directories={**tiny_inputs.directories, "train": trained}, known={type(measured): measured})
    facts = evaluate.run(tiny_config(), inputs, out)
    return Run(inputs, out, facts, [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()])


def test_every_held_out_record_has_a_line_in_the_order_of_its_id(run: Run) -> None:
    assert len(run.lines) == run.facts.num_records == run.facts.num_held_out == 8
    assert [line["id"] for line in run.lines] == sorted(line["id"] for line in run.lines)
    for line in run.lines:
        assert set(line) == {"id", "messages", "prompt", "prompt_ids", "expected", "base", "tuned", "tuned_ids"}
        assert line["prompt"].endswith("<start_of_turn>model\n") and not line["prompt"].startswith("<bos>")
        assert line["prompt_ids"][0] == 2 and line["messages"][-1]["role"] == "user"


def test_a_prompt_is_what_was_trained_before_the_answer(run: Run, tiny_prepared: Path) -> None:
    from trainer.dataset import records

    trained = {record.id: record for record in records.read(tiny_prepared / "valid.jsonl")}
    for line in run.lines:
        record = trained[line["id"]]
        assert line["prompt_ids"] == list(record.ids[: record.spans[-1][0]])


def test_training_lowered_the_held_out_loss(run: Run) -> None:
    assert run.facts.loss_tuned < run.facts.loss_base
    assert run.facts.exact_match_base is not None and run.facts.exact_match_tuned is not None


def test_answers_in_a_batch_are_the_answers_one_by_one(run: Run, tiny_config: Make, tmp_path: Path) -> None:
    """Left padding and positions: a prompt's neighbours must not change its answer."""
    alone = evaluate.run(tiny_config("evaluate.batch_records=1"), run.inputs, tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == (run.out / "answers.jsonl").read_text()
    assert alone.loss_tuned == pytest.approx(run.facts.loss_tuned, rel=1e-5)


def test_the_reference_holds_the_distributions_of_stock_peft(run: Run, tiny_config: Make) -> None:
    """Teacher-forced log-probabilities, against a model that stock PEFT loads and runs without any of our code."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trainer.training import model as models

    found = np.load(run.out / "reference" / "logprobs.npz")
    assert run.facts.num_reference == 4
    assert found["record"].tolist() == [number for number, line in enumerate(run.lines[:4]) for _ in line["tuned_ids"]]
    assert found["position"].tolist() == [place for line in run.lines[:4] for place in range(len(line["tuned_ids"]))]
    assert found["ids"].dtype == found["record"].dtype == np.int32 and found["logprobs"].dtype == np.float32
    cfg = tiny_config()
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models.nf4(cfg), dtype=torch.float32), str(run.inputs.path("train") / "best")
    ).eval()
    line = run.lines[1]
    with torch.no_grad():
        logits = stock(input_ids=torch.tensor([line["prompt_ids"] + line["tuned_ids"]])).logits[0, len(line["prompt_ids"]) - 1 : -1]
    mine = found["record"] == 1
    expected = torch.log_softmax(logits, 1).gather(1, torch.from_numpy(found["ids"][mine]).long())
    np.testing.assert_allclose(found["logprobs"][mine], expected.numpy(), atol=1e-4)
    assert (found["ids"][mine][:, 0] == line["tuned_ids"]).all(), "greedy: each token was the most likely one"


def test_what_was_trained_comes_from_the_adapter_not_from_the_config(run: Run, tiny_config: Make, tmp_path: Path) -> None:
    """Rank 4 -> 64 in the config after training would merge wrongly, silently."""
    facts = evaluate.run(
        tiny_config("adapter.rank=64", "adapter.alpha=1", "adapter.dora=false", "train.learning_rate=1"), run.inputs, tmp_path
    )
    assert facts.model_dump(exclude={"wall_s"}) == run.facts.model_dump(exclude={"wall_s"})


def test_the_source_reads_neither_cfg_adapter_nor_cfg_train() -> None:
    tree = ast.parse(Path(evaluate.__file__).read_text(encoding="utf-8"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg"
    }
    assert read and not read & {"adapter", "train"}


def test_base_weights_that_were_replaced_since_are_refused(run: Run, tiny_config: Make, tmp_path: Path) -> None:
    other = run.inputs.facts(TrainFacts).model_copy(update={"base_sha256": "0" * 64})
    with pytest.raises(ModelError, match="not those that the adapter was trained on"):
        evaluate.run(tiny_config(), run.inputs._replace(known={TrainFacts: other}), tmp_path)


def test_export_checkpoint_chooses_the_adapter(run: Run, tiny_config: Make, tmp_path: Path) -> None:
    """Sentinel for `best`: here the last adapter is another one."""
    from safetensors.torch import load_file, save_file

    last = tmp_path / "train"
    for name in ("adapter", "best"):
        (last / name).mkdir(parents=True)
        for file in (run.inputs.path("train") / name).iterdir():
            (last / name / file.name).write_bytes(file.read_bytes())
    weights = last / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) if "lora_B" in name else value for name, value in load_file(weights).items()}, weights)
    inputs = run.inputs._replace(directories={**run.inputs.directories, "train": last})
    out = tmp_path / "out"
    out.mkdir()
    facts = evaluate.run(tiny_config("export.checkpoint=last"), inputs, out)
    assert facts.loss_tuned != pytest.approx(run.facts.loss_tuned, rel=1e-3)


def test_without_exact_match_only_the_reference_is_answered(run: Run, tiny_config: Make, tmp_path: Path) -> None:
    facts = evaluate.run(tiny_config("evaluate.exact_match=false"), run.inputs, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert facts.exact_match_base is None and facts.exact_match_tuned is None
    assert [line["tuned"] for line in lines] == [line["tuned"] for line in run.lines[:4]] + [""] * 4
    assert all(line["base"] == "" for line in lines)
