"""trl: a loss scale moves nothing but gradients, survives a checkpoint, and an overflow costs its own step alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.backends import peft, trl
from trainer.config import Config
from trainer.dataset import records
from trainer.training import checkpoints, optimizer
from trainer.training import model as models
from trainer.training.batches import examples, row
from trainer.training.scaling import FIRST, Stepper

Make = Callable[..., Config]
ORIGIN = checkpoints.Origin(key="", base_sha256="", rank=4, dora=True)


class Diary:
    """Observer that notes what it is told."""

    def __init__(self) -> None:
        self.logs: list[Mapping[str, float]] = []

    def began(self, state: Any) -> None: ...
    def stepped(self, state: Any) -> None: ...

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        if "loss" in figures:
            self.logs.append({name: figures[name] for name in ("loss", "grad_norm", "learning_rate") if name in figures})

    def due(self) -> bool:
        return False

    def stop(self) -> bool:
        return False


class Hidden:
    """A model's own hidden states, counted; the gradient that flows back through call number `bad` is infinite."""

    def __init__(self, model: Any, bad: int | None = None) -> None:
        self._compute, self._bad, self.calls = models.hidden_states(model), bad, 0

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        assert not {"labels", "supervised", "num_tokens"} & inputs.keys()
        found = self._compute(inputs)
        if self.calls == self._bad:
            found.register_hook(lambda grad: grad * float("inf"))  # type: ignore[no-untyped-call]
        self.calls += 1
        return found


class Attempt:
    """Three optimizer steps of two passes each, or what is left of them."""

    def __init__(self, cfg: Config, prepared: Path, out: Path, *, scaled: bool, bad: int | None = None) -> None:
        self.model = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
        assert peft.keep_norms(self.model, new=True)
        self.stepper = Stepper(
            optimizer.build(self.model.named_parameters(), cfg.train),
            max_norm=cfg.train.max_grad_norm,
            after=lambda: peft.refresh_norms(self.model),
            scaled=scaled,
        )
        self.diary, self.hidden = Diary(), Hidden(self.model, bad)
        directory = out / "checkpoints"
        directory.mkdir(parents=True, exist_ok=True)
        self.trainer = trl.trainer(
            self.model,
            [row(one) for one in examples(records.read(prepared / "train.jsonl"))],
            models.tensors,
            train=cfg.train,
            accumulation=2,
            every_steps=1,
            partial=directory / checkpoints.PARTIAL,
            device="cpu",
            checkpointing=False,
            optimizer=self.stepper,
            save_adapter=lambda target: peft.save(self.model, target),
            seal=lambda written: checkpoints.seal(written, directory, 5, ORIGIN),
            observer=self.diary,
            hidden=self.hidden,
        )

    def run(self, resume: Path | None = None) -> Attempt:
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return self

    @property
    def weights(self) -> list[Tensor]:
        return [one.detach() for one in self.model.parameters() if one.requires_grad]


def equal(one: Attempt, other: Attempt) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.weights, other.weights, strict=True))


@pytest.fixture(scope="module")
def cfg(tiny_config: Make) -> Config:
    return tiny_config("train.max_steps=3")


@pytest.fixture(scope="module")
def scaled(cfg: Config, tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Attempt]:
    """A run whose third pass, in the second step, overflows."""
    out = tmp_path_factory.mktemp("scaled")
    return out, Attempt(cfg, tiny_prepared, out, scaled=True, bad=3).run()


def test_a_scale_changes_neither_weights_nor_what_is_logged(cfg: Config, tiny_prepared: Path, tmp_path: Path) -> None:
    """Powers of two: to the last bit. Clipping is at work in each step."""
    with_scale, without = (Attempt(cfg, tiny_prepared, tmp_path / str(scaled), scaled=scaled).run() for scaled in (True, False))
    assert with_scale.stepper.scale == FIRST and without.stepper.scale == 1.0
    assert with_scale.diary.logs == without.diary.logs
    assert all(one["grad_norm"] > cfg.train.max_grad_norm for one in without.diary.logs)
    assert equal(with_scale, without)


def test_hidden_states_come_from_who_is_handed_in(scaled: tuple[Path, Attempt]) -> None:
    assert scaled[1].hidden.calls == 6


def test_an_overflow_costs_its_own_step_and_is_logged_as_a_step(scaled: tuple[Path, Attempt]) -> None:
    out, made = scaled
    assert (made.stepper.scale, made.stepper.skipped) == (FIRST / 2, 1)
    assert ["grad_norm" in one for one in made.diary.logs] == [True, False, True]
    first, second, third = (out / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors" for step in (1, 2, 3))
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()


def test_the_scale_comes_back_with_a_checkpoint(scaled: tuple[Path, Attempt], cfg: Config, tiny_prepared: Path, tmp_path: Path) -> None:
    out, whole = scaled
    again = Attempt(cfg, tiny_prepared, tmp_path, scaled=True).run(out / "checkpoints" / "checkpoint-2")
    assert again.hidden.calls == 2
    assert (again.stepper.scale, again.stepper.skipped) == (FIRST / 2, 1)
    assert again.diary.logs == whole.diary.logs[2:]
