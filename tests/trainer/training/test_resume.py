"""Going on after whatever ended a training: the same losses and the same adapter to the last bit, on real trains of two layers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.dataset.records import read
from trainer.errors import Interrupted, MachineError, StaleError
from trainer.facts import TrainFacts
from trainer.training import checkpoints, loop
from trainer.training.batches import examples

Make = Callable[..., Config]

SETTINGS = (
    "train.max_steps=5", "train.batch_records=1", "train.tokens_per_step=150", "train.valid_every=2", "train.valid_records=4",
    "checkpoint.every_steps=100", "train.gradient_checkpointing=false", "adapter.dora=false", "adapter.dropout=0.1",
)  # fmt: skip
"""Several passes a step; with dropout, so that random numbers matter."""


@pytest.fixture
def go(tiny_config: Make, tiny_prepared: Path) -> Callable[..., TrainFacts]:
    def go(out: Path, *settings: str, after_step: Callable[[int], None] = lambda step: None) -> TrainFacts:
        out.mkdir(exist_ok=True)
        rows, valid = (examples(read(tiny_prepared / name)) for name in ("train.jsonl", "valid.jsonl"))
        return loop.run(tiny_config(*SETTINGS, *settings), rows, valid, out, after_step)

    return go


@pytest.fixture(scope="module")
def whole(tiny_config: Make, tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainFacts]:
    out = tmp_path_factory.mktemp("whole")
    rows, valid = (examples(read(tiny_prepared / name)) for name in ("train.jsonl", "valid.jsonl"))
    facts = loop.run(tiny_config(*SETTINGS), rows, valid, out)
    assert facts.accumulation > 3
    return out, facts


def same(out: Path, facts: TrainFacts, whole: tuple[Path, TrainFacts]) -> None:
    assert facts.train_loss == whole[1].train_loss and facts.valid_loss == whole[1].valid_loss
    assert (facts.num_tokens, facts.best_step) == (whole[1].num_tokens, whole[1].best_step)
    for name in ("adapter", "best"):
        file = Path(name) / "adapter_model.safetensors"
        assert (out / file).read_bytes() == (whole[0] / file).read_bytes()


def at(step: int, act: Callable[[], None]) -> Callable[[int], None]:
    def after(done: int) -> None:
        if done == step:
            act()

    return after


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def soon() -> None:
    """In the next step, which takes longer."""
    signal.signal(signal.SIGALRM, lambda *_: terminate())
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def test_a_signal_amid_a_step_saves_the_step_before_and_loses_no_bit(
    go: Callable[..., TrainFacts], whole: tuple[Path, TrainFacts], tmp_path: Path
) -> None:
    """The passes since are given up, their random numbers and tokens with them; waiting for the step would have said `after step 4`."""
    with pytest.raises(Interrupted, match=r"after step 3 of 5; a checkpoint is saved"):
        go(tmp_path, after_step=at(3, soon))
    assert [path.name for path in checkpoints.every(tmp_path / "checkpoints")] == ["checkpoint-3"]
    same(tmp_path, go(tmp_path), whole)


def test_a_signal_amid_a_validation_gives_it_up_and_makes_it_after_the_resume(
    go: Callable[..., TrainFacts], whole: tuple[Path, TrainFacts], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match=r"after step 4 of 5"):
        go(tmp_path, after_step=at(4, terminate))
    assert '"step": 4, "valid_loss"' not in (tmp_path / "metrics.jsonl").read_text()
    same(tmp_path, go(tmp_path), whole)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_training_that_was_saved_at_its_last_step_makes_no_other(go: Callable[..., TrainFacts], tmp_path: Path, schedule: str) -> None:
    """It was killed between its last checkpoint and what is published; a step more at a constant rate would be another adapter."""
    first = go(tmp_path, f"train.schedule={schedule}")
    assert [path.name for path in checkpoints.every(tmp_path / "checkpoints")] == ["checkpoint-5"]
    adapter, metrics = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "adapter")
    again = go(tmp_path, f"train.schedule={schedule}")
    assert again.steps == first.steps == 5
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_minutes_alone_make_checkpoints(go: Callable[..., TrainFacts], whole: tuple[Path, TrainFacts], tmp_path: Path) -> None:
    facts = go(tmp_path, "checkpoint.every_minutes=0.00001", "checkpoint.keep=9")
    assert len(checkpoints.every(tmp_path / "checkpoints")) == 5
    same(tmp_path, facts, whole)


@pytest.mark.parametrize("torn", [False, True])
def test_a_fresh_machine_goes_on_from_the_mirror(
    torn: bool, go: Callable[..., TrainFacts], whole: tuple[Path, TrainFacts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest slot, or where a byte of it flipped the other one."""
    drive, gone, fresh = (tmp_path / name for name in ("drive", "gone", "fresh"))
    drive.mkdir()
    mirrored = (f"checkpoint.mirror={drive}", "checkpoint.every_steps=1", "run.name=mirrored")
    with pytest.raises(Interrupted):
        go(gone, *mirrored, after_step=at(3, terminate))
    shutil.rmtree(gone)
    if torn:
        slot = drive / "mirrored" / "a.tar"  # steps 1 and 3
        data = bytearray(slot.read_bytes())
        data[len(data) // 2] ^= 1
        slot.write_bytes(data)
    facts = go(fresh, *mirrored)
    assert f"mirror: step {2 if torn else 3} restored" in capsys.readouterr().out
    same(fresh, facts, whole)


def test_a_disk_that_fills_up_amid_a_checkpoint_keeps_the_last_good_one(
    go: Callable[..., TrainFacts], whole: tuple[Path, TrainFacts], tmpfs: Callable[[str], Path]
) -> None:
    """A real one: the third checkpoint finds no room. With room again the same command ends where the undisturbed run does."""
    every = ("checkpoint.every_steps=1", "checkpoint.keep=9")
    used = sum(path.stat().st_size for path in (whole[0] / "checkpoints").rglob("*"))
    disk = tmpfs(f"{int(3.6 * used / 1024)}k")
    with pytest.raises(MachineError, match=r"could not be written .*the checkpoint of step \d is kept.*the same command goes on"):
        go(disk / "run", *every)
    kept = checkpoints.every(disk / "run" / "checkpoints")
    assert kept and all(checkpoints.whole(path) for path in kept)
    assert not list((disk / "run").rglob("partial")), "what was half written gives its room back"
    tmpfs("100m")
    same(disk / "run", go(disk / "run", *every), whole)


def test_a_checkpoint_on_another_base_is_refused_with_the_difference(
    go: Callable[..., TrainFacts], whole: tuple[Path, TrainFacts], tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "copy")
    record = tmp_path / "copy" / "checkpoints" / "checkpoint-5" / checkpoints.RECORD
    record.write_text(record.read_text().replace('"base_sha256": "', '"base_sha256": "0'))
    with pytest.raises(StaleError, match=r"another training:\n  base_sha256: 0"):
        go(tmp_path / "copy")
