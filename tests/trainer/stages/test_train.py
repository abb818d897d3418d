"""train: the whole stage on two random layers: files, loss, resume, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import Config
from trainer.dataset.records import read
from trainer.errors import ConfigError, Interrupted, StoppedError
from trainer.facts import TrainFacts
from trainer.stages import train
from trainer.training import loop
from trainer.training.batches import examples

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def trained(tiny_config: Make, tiny_inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainFacts]:
    """Eight steps without an interruption, with a checkpoint at every second."""
    out = tmp_path_factory.mktemp("train")
    return out, train.run(tiny_config("train.max_steps=8"), tiny_inputs, out)


def losses(facts: TrainFacts) -> list[float]:
    return [point.loss for point in facts.train_loss]


def test_it_leaves_pefts_two_files_twice_and_the_metrics(trained: tuple[Path, TrainFacts]) -> None:
    out, _ = trained
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "best", "checkpoints", "metrics.jsonl"]
    for folder in ("adapter", "best"):
        assert sorted(path.name for path in (out / folder).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_adapter_says_what_it_is(trained: tuple[Path, TrainFacts]) -> None:
    found = json.loads((trained[0] / "adapter" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == "random:tiny", "a name, not a cache directory"
    assert (found["r"], found["lora_alpha"], found["use_dora"], found["use_rslora"]) == (4, 4, True, True)
    assert len(found["target_modules"]) == 7


def test_the_facts_are_what_the_metrics_say(trained: tuple[Path, TrainFacts]) -> None:
    out, facts = trained
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [event["loss"] for event in events if "loss" in event] == losses(facts)
    assert {"step", "loss", "learning_rate", "tokens_per_s", "peak_bytes", "wall_s"} <= events[-1].keys()
    assert [point.step for point in facts.valid_loss] == [2, 4, 6, 8]
    best = min(facts.valid_loss, key=lambda point: point.loss)
    assert facts.best_step == best.step and facts.steps == 8
    assert (facts.rank, facts.alpha, facts.dora, facts.rslora, facts.packed) == (4, 4.0, True, True, False)
    assert facts.num_tokens == events[-1]["num_tokens"] > 0


def test_it_learns(trained: tuple[Path, TrainFacts]) -> None:
    _, facts = trained
    assert facts.valid_loss[-1].loss < facts.valid_loss[0].loss


def test_everything_trains_in_float32(trained: tuple[Path, TrainFacts]) -> None:
    """TRL casts a quantised model's adapter to bfloat16, which a T4 has not and which swallows small updates."""
    from safetensors.torch import load_file

    tensors = load_file(trained[0] / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    matrices = [value for name, value in tensors.items() if "lora_A" in name]
    assert any(not torch.equal(value, value.bfloat16().float()) for value in matrices), "nor did it round them once"


def test_a_killed_train_goes_on_as_if_nothing_had_happened(
    trained: tuple[Path, TrainFacts], tiny_config: Make, tiny_inputs: Any, tmp_path: Path
) -> None:
    """SIGTERM at some step; the same command again gives the same losses to the last bit, and the same adapter."""
    killed(tiny_config("train.max_steps=8", "checkpoint.every_steps=100"), tiny_inputs, tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) == 1
    facts = train.run(tiny_config("train.max_steps=8"), tiny_inputs, tmp_path)
    out, whole = trained
    same(tmp_path, facts, out, whole)


def killed(cfg: Config, inputs: Any, out: Path) -> None:
    """A train that gets SIGTERM after its third step."""
    metrics = out / "metrics.jsonl"

    def terminate() -> None:
        while not metrics.exists() or '"step": 3' not in metrics.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(Interrupted, match="a checkpoint is saved"):
        train.run(cfg, inputs, out)
    thread.join()


def same(left: Path, facts: TrainFacts, right: Path, others: TrainFacts) -> None:
    """To the last bit."""
    assert losses(facts) == losses(others)
    assert facts.valid_loss == others.valid_loss and facts.num_tokens == others.num_tokens
    for folder in ("adapter", "best"):
        name = Path(folder) / "adapter_model.safetensors"
        assert (left / name).read_bytes() == (right / name).read_bytes()


def test_our_layer_takes_the_same_course_and_goes_on_after_a_kill(
    trained: tuple[Path, TrainFacts], tiny_config: Make, tiny_inputs: Any, tmp_path: Path
) -> None:
    ours = ("train.max_steps=8", "kernels.layer=ours", "kernels.keep_bytes=100_000", "kernels.span_layers=2")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = train.run(tiny_config(*ours), tiny_inputs, tmp_path / "whole")
    assert "layer: 2 of 2" in whole.kernels and "span: 2" in whole.kernels
    assert losses(whole) == pytest.approx(losses(trained[1]), rel=1e-4)
    assert whole.valid_loss[-1].loss == pytest.approx(trained[1].valid_loss[-1].loss, rel=1e-4)
    killed(tiny_config(*ours, "checkpoint.every_steps=100"), tiny_inputs, tmp_path / "killed")
    facts = train.run(tiny_config(*ours), tiny_inputs, tmp_path / "killed")
    same(tmp_path / "killed", facts, tmp_path / "whole", whole)


def test_a_validation_loss_that_is_no_number_is_never_the_best(
    tiny_config: Make, tiny_inputs: Any, tiny_prepared: Path, tmp_path: Path
) -> None:
    """The first step warms up and changes little; later ones make weights that overflow when held-out records are read."""
    from safetensors.torch import load_file

    with pytest.raises(StoppedError, match=r"the validation loss"):
        train.run(tiny_config("train.learning_rate=6e37", "train.max_grad_norm=1e30", "train.valid_every=1"), tiny_inputs, tmp_path)
    best = load_file(tmp_path / "best" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in best.values())


def test_a_train_that_was_finished_and_not_yet_published_is_not_repeated(
    trained: tuple[Path, TrainFacts], tiny_config: Make, tiny_inputs: Any, tmp_path: Path
) -> None:
    """A crash between the last step and publishing: the last checkpoint is still there, and the same command ends at once with the same."""
    out, whole = trained
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    steps: list[int] = []
    cfg = tiny_config("train.max_steps=8")
    prepared = tiny_inputs.path("prepare")
    rows, valid = (examples(read(prepared / name)) for name in ("train.jsonl", "valid.jsonl"))
    facts = loop.run(cfg, rows, valid, tmp_path, steps.append)
    assert steps == [] and facts.steps == whole.steps
    assert losses(facts) == losses(whole) and facts.valid_loss == whole.valid_loss and facts.best_step == whole.best_step
    for folder in ("adapter", "best"):
        name = Path(folder) / "adapter_model.safetensors"
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tiny_config: Make, tiny_inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match=r"no number after step \d+.*learning_rate"):
        cfg = tiny_config(
            "train.learning_rate=6e37", "train.max_grad_norm=1e30", "checkpoint.every_steps=1", "train.valid_every=100", "train.max_steps=8"
        )
        train.run(cfg, tiny_inputs, tmp_path)
    assert list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_the_loss_is_the_mean_over_a_whole_steps_tokens(tiny_config: Make, tiny_inputs: Any, tmp_path: Path) -> None:
    """24 records in one pass, or in six of four with paddings of their own: one step, one loss, one update."""
    found = {}
    for records in (24, 4):
        out = tmp_path / str(records)
        out.mkdir()
        cfg = tiny_config(f"train.batch_records={records}", "train.tokens_per_step=1000000", "train.max_steps=1", "train.warmup_steps=0")
        found[records] = train.run(cfg, tiny_inputs, out)
    assert found[24].train_loss[0].loss == pytest.approx(found[4].train_loss[0].loss, rel=1e-6)
    assert found[24].valid_loss[0].loss == pytest.approx(found[4].valid_loss[0].loss, rel=1e-5)


def test_a_step_is_computed_with_the_norms_of_its_weights(tiny_config: Make, tiny_prepared: Path, tmp_path: Path) -> None:
    """On the same rows, the loss that a step finds is what was measured after the step before, with norms computed on the spot.

    Sentinel: with norms that nobody renewed the third step is off by 1e-2 (measured).
    """
    cfg = tiny_config(
        "train.batch_records=24", "train.max_steps=3", "train.warmup_steps=0", "train.learning_rate=0.05", "train.valid_every=1",
        "train.valid_records=24",
    )  # fmt: skip
    rows = examples(read(tiny_prepared / "train.jsonl"))
    facts = loop.run(cfg, rows, rows, tmp_path)
    measured = [point.loss for point in facts.valid_loss]
    assert losses(facts)[1:] == pytest.approx(measured[:-1], rel=1e-5)


def test_torchs_own_loss_gives_the_same_course(
    trained: tuple[Path, TrainFacts], tiny_config: Make, tiny_inputs: Any, tmp_path: Path
) -> None:
    facts = train.run(tiny_config("train.max_steps=8", "kernels.loss=stock"), tiny_inputs, tmp_path)
    assert losses(facts) == pytest.approx(losses(trained[1]), rel=1e-5)


def test_packed_rows_give_the_loss_of_single_ones(tiny_config: Make, tiny_inputs: Any, tmp_path: Path) -> None:
    found = {}
    for packing in ("true", "false"):
        out = tmp_path / packing
        out.mkdir()
        cfg = tiny_config(
            f"pack.enabled={packing}", "train.batch_records=1", "train.tokens_per_step=1000000", "train.max_steps=1", "train.warmup_steps=0"
        )
        found[packing] = train.run(cfg, tiny_inputs, out)
    assert found["true"].packed and found["true"].num_tokens == found["false"].num_tokens
    assert found["true"].train_loss[0].loss == pytest.approx(found["false"].train_loss[0].loss, rel=1e-5)


def test_packing_is_refused_where_the_attention_looks_across_boundaries(tiny_config: Make, tiny_prepared: Path) -> None:
    from trainer.dataset import records
    from trainer.training import model as models
    from trainer.training.batches import examples

    cfg = tiny_config()
    model = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
    first, second = examples(records.read(tiny_prepared / "train.jsonl"))[:2]
    models.require_boundaries(model, (first, second))

    def blind(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}

    model.get_base_model().model.register_forward_pre_hook(blind, with_kwargs=True)
    with pytest.raises(ConfigError, match=r"pack\.enabled"):
        models.require_boundaries(model, (first, second))


def test_a_shorter_context_and_one_row_a_pass_go_on_from_the_same_checkpoint(tiny_config: Make, tiny_inputs: Any, tmp_path: Path) -> None:
    """What the ladder does where memory runs out: progress stays, a step still sees as many tokens, and what is too long is cut or left."""
    before = tiny_config("train.max_steps=8", "train.tokens_per_step=512")
    killed(before, tiny_inputs, tmp_path)
    prepared = [len(record.ids) for record in read(tiny_inputs.path("prepare") / "train.jsonl")]
    lowered = tiny_config("train.max_steps=8", "train.tokens_per_step=512", "train.batch_records=1", f"data.max_tokens={max(prepared) - 1}")
    assert train.lost(tiny_inputs, max(prepared) - 1).num_left_out == sum(length == max(prepared) for length in prepared)
    facts = train.run(lowered, tiny_inputs, tmp_path)
    assert facts.steps == 8 and [point.step for point in facts.train_loss] == list(range(1, 9)), "the first three are the first run's"
    assert facts.max_tokens == max(prepared) - 1
    kept = [length for length in prepared if length < max(prepared)]
    assert facts.accumulation * sum(kept) / len(kept) == pytest.approx(512, rel=0.1), "tokens of a step that no epoch's end cuts short"
