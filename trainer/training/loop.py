"""One training of one adapter: steps, validation, best and last adapter, checkpoints, and going on from one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer import artifacts, progress
from trainer.backends import bitsandbytes, hub, peft
from trainer.config import Config
from trainer.dataset.pack import pack
from trainer.errors import Interrupted, StoppedError
from trainer.facts import TrainFacts
from trainer.kernels import loss
from trainer.planner import standing
from trainer.training import checkpoints, interrupt, measure, memory, mirror, optimizer, probe
from trainer.training import model as models
from trainer.training.batches import Example, Row, accumulation, row, sample
from trainer.training.journal import Journal
from trainer.training.scaling import Stepper, diverged


class Work(NamedTuple):
    """What one training consists of."""

    rows: Sequence[Row]
    valid: Sequence[Row]
    accumulation: int
    """Forward passes of an optimizer step."""
    steps: int
    """Optimizer steps in all."""


def work(cfg: Config, train: Sequence[Example], valid: Sequence[Example]) -> Work:
    """Rows from examples: one each, or packed; and how many forward passes make an optimizer step."""
    rows, held_out = _rows(cfg, train), _rows(cfg, sample(valid, cfg.train.valid_records))
    mean = sum(len(one.ids) for one in rows) / len(rows)
    passes = accumulation(cfg.train.tokens_per_step, cfg.train.batch_records, mean)
    each_epoch = math.ceil(math.ceil(len(rows) / cfg.train.batch_records) / passes)
    return Work(rows, held_out, passes, cfg.train.max_steps or math.ceil(cfg.train.epochs * each_epoch))


def _rows(cfg: Config, found: Sequence[Example]) -> list[Row]:
    if not cfg.pack.enabled:
        return [row(one) for one in found]
    return [row(*(found[number] for number in members)) for members in pack([len(one.ids) for one in found], cfg.data.max_tokens)]


class Computing(NamedTuple):
    """How a model with an adapter computes a step."""

    hidden: loss.Hidden
    """Final hidden states, in training and in validation."""
    refresh: Callable[[], None]
    """Renews what follows from the adapter's weights: DoRA's norms."""
    active: tuple[str, ...]
    """Names of our own pieces, for the facts."""
    gather: Callable[[], None] = lambda: None
    """Brings gradients that wait elsewhere back before a step."""
    pinned_bytes: int = 0
    summed: loss.Summed = loss.summed_cross_entropy


def computing(cfg: Config, model: Any) -> Computing:
    """Put the pieces that cfg.kernels names into a model with a new adapter."""
    if cfg.kernels.layer == "ours":
        stack = models.installed(cfg, model)
        return Computing(stack.hidden, stack.refresh, stack.active, stack.gather, stack.pinned_bytes, stack.summed)
    kept = cfg.model.backend == "transformers" and cfg.kernels.dora == "ours" and peft.keep_norms(model, new=True)
    return Computing(models.hidden_states(model), lambda: peft.refresh_norms(model), (peft.SEAM,) if kept else ())


def run(
    cfg: Config, train: Sequence[Example], valid: Sequence[Example], out: Path, after_step: Callable[[int], None] = lambda step: None
) -> TrainFacts:
    """Train into `out`: adapter/, best/, metrics.jsonl. checkpoints/ stays until the stage is published: a crash before that goes on
    from the last one.

    after_step: called with the number of each finished optimizer step, before anything else happens; for measurements.

    Raises:
        Interrupted: a checkpoint was saved. StoppedError: the loss is no number; the last checkpoint stays.
    """
    with checkpoints.writing(out):
        checkpoints.tidy(out)
    state_dir = models.nf4(cfg)
    kept = Kept(cfg, out, bitsandbytes.sha256(state_dir))
    model = models.with_new_adapter(cfg, models.base(cfg, state_dir))
    how = computing(cfg, model)
    progress.say("train: kernels: " + (", ".join(how.active) or "none of ours"))
    if cfg.pack.enabled:
        models.require_boundaries(model, _probe(train), how.hidden)
    stepper = Stepper(
        optimizer.build(model.named_parameters(), cfg.train),
        max_norm=cfg.train.max_grad_norm,
        after=how.refresh,
        scaled=cfg.model.dtype == "float16",
        gather=how.gather,
    )
    todo = work(cfg, train, valid)
    resume = kept.newest()
    done = checkpoints.step_of(resume) if resume else 0
    journal = Journal(out / "metrics.jsonl", done)
    with checkpoints.writing(out), interrupt.listening() as stop, progress.task("train", todo.steps - done, "steps") as task:
        watch = Watch(cfg, model, how, stepper, todo, journal, out, stop, task, after_step, kept.schedule)
        state = _train(cfg, model, how, stepper, todo, watch, kept, resume)
        if stop() and state.global_step < state.max_steps:
            saved = "a checkpoint is saved" if state.global_step else "nothing was done that a checkpoint could save"
            raise Interrupted(f"train: interrupted after step {state.global_step} of {state.max_steps}; {saved}, the same command goes on")
        peft.save(model, out / "adapter.new")
        checkpoints.replace(out / "adapter.new", out / "adapter")
    return _facts(cfg, todo, journal, state, how).model_copy(update={"base_sha256": kept.origin.base_sha256})


class Kept:
    """Where the checkpoints of one training are: on the disk, and in the mirror if there is one."""

    def __init__(self, cfg: Config, out: Path, base_sha256: str) -> None:
        label = artifacts.draft_label(out.with_suffix(""))
        self.origin = checkpoints.Origin(
            key=label.key if label else "", base_sha256=base_sha256, rank=cfg.adapter.rank, dora=cfg.adapter.dora
        )
        self.schedule = checkpoints.Schedule(cfg.checkpoint.every_minutes)
        self.directory = out / "checkpoints"
        self._out, self._keep = out, cfg.checkpoint.keep
        mirror_dir = cfg.checkpoint.mirror
        self._mirror = mirror.Mirror(mirror_dir / cfg.run.name, self.origin, fresh=cfg.run.fresh) if mirror_dir else None

    def newest(self) -> Path | None:
        """The checkpoint to go on from; from the mirror where the disk has none."""
        self.directory.mkdir(exist_ok=True)
        found = checkpoints.newest(self.directory, self.origin)
        if found is None and self._mirror:
            self._mirror.restore(self._out)
            found = checkpoints.newest(self.directory, self.origin)
        return found

    def seal(self, written: Path) -> None:
        with (self._out / "metrics.jsonl").open("rb") as metrics:
            os.fsync(metrics.fileno())  # a checkpoint never knows of steps that the journal lost
        sealed = checkpoints.seal(written, self.directory, self._keep, self.origin)
        if self._mirror:
            self._mirror.save(sealed, self._out)
        self.schedule.saved()


class _Interrupted(Exception):
    """A validation that nobody waits for any more."""


def _train(cfg: Config, model: Any, how: Computing, stepper: Stepper, todo: Work, watch: Watch, kept: Kept, resume: Path | None) -> Any:
    """Run HF's loop; returns its TrainerState."""
    from trainer.backends import trl  # after the model: unsloth must be imported before trl

    made = trl.trainer(
        model,
        todo.rows,
        models.collator(cfg),
        train=cfg.train,
        accumulation=todo.accumulation,
        every_steps=cfg.checkpoint.every_steps,
        partial=kept.directory / checkpoints.PARTIAL,
        device=cfg.model.device,
        # unsloth brings a checkpointing of its own
        checkpointing=cfg.train.gradient_checkpointing and cfg.model.backend != "unsloth",
        optimizer=stepper,
        save_adapter=lambda target: peft.save(model, target),
        seal=kept.seal,
        observer=watch,
        hidden=how.hidden,
        summed=_summed(cfg, how),
    )
    if resume:
        progress.say(f"train: going on from step {checkpoints.step_of(resume)}")
    made.train(resume_from_checkpoint=str(resume) if resume else None)
    return made.state


class Watch:
    """Observer of the loop: validation, best adapter, journal, progress."""

    def __init__(
        self,
        cfg: Config,
        model: Any,
        how: Computing,
        stepper: Stepper,
        todo: Work,
        journal: Journal,
        out: Path,
        stop: Callable[[], bool],
        task: progress.Task,
        after_step: Callable[[int], None],
        schedule: checkpoints.Schedule,
    ) -> None:
        self._cfg, self._model, self._how, self._stepper, self._todo = cfg, model, how, stepper, todo
        self._journal, self._out, self._task, self._after_step = journal, out, task, after_step
        self._stop, self.due = stop, schedule.due
        self._before_s = journal.wall_s
        self._tokens = 0
        self._started = self._stepped = time.monotonic()

    def began(self, state: Any) -> None:
        assert state.max_steps == self._todo.steps, "we and HF count steps differently"
        self._tokens = int(state.num_input_tokens_seen)
        self._how.refresh()  # a checkpoint may have replaced the weights
        if state.global_step < state.max_steps:
            _probe_longest(self._cfg, self._model, self._how, self._stepper, self._todo)
        self._remember_best(state)
        if state.global_step and self._validation_is_due(state) and self._journal.last_step("valid_loss") < state.global_step:
            self._validate(state)  # the training was interrupted before it
        self._started = self._stepped = time.monotonic()

    def stepped(self, state: Any) -> None:
        self._after_step(state.global_step)
        now = time.monotonic()
        self._step_s, self._step_tokens = now - self._stepped, int(state.num_input_tokens_seen) - self._tokens
        self._tokens = int(state.num_input_tokens_seen)
        if self._validation_is_due(state):
            self._validate(state)
        self._stepped = time.monotonic()

    def _validation_is_due(self, state: Any) -> bool:
        return bool(state.global_step % self._cfg.train.valid_every == 0 or state.global_step == state.max_steps)

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        """Raises StoppedError where the loss is no number, before this step's checkpoint is written."""
        if "loss" not in figures:
            return
        if not math.isfinite(figures["loss"]):
            raise StoppedError(diverged(step - 1, "the loss"))
        speed, peak = self._step_tokens / self._step_s, memory.peak_bytes(self._cfg.model.device)
        self._journal.write(
            step,
            loss=figures["loss"],
            learning_rate=figures["learning_rate"],
            grad_norm=self._stepper.grad_norm,
            loss_scale=self._stepper.scale,
            skipped=self._stepper.skipped,
            tokens_per_s=speed,
            num_tokens=self._tokens,
            step_s=self._step_s,
            wall_s=self._before_s + time.monotonic() - self._started,
            peak_bytes=peak,
        )
        self._task.advance(loss=figures["loss"], tokens_per_s=speed, memory=f"{peak / 1e9:.1f} GB")

    def _validate(self, state: Any) -> None:
        """An interrupted one is given up, and made after the resume: on a T4 it can take longer than a person waits."""
        ours = self._cfg.kernels.layer == "ours"  # its norms are kept anyhow, and a packed row fills the card
        batch_rows = 1 if ours or self._cfg.pack.enabled else max(4, self._cfg.train.batch_records)
        batch = models.collator(self._cfg)
        try:
            with measure.evaluating(self._model), nullcontext() if ours else peft.frozen_norms(self._model):
                found = measure.loss(self._model, self._todo.valid, batch_rows, self._heed, hidden=self._how.hidden, batch=batch)
        except _Interrupted:
            return
        if not math.isfinite(found):  # nothing is smaller than NaN: it would be the best for ever
            raise StoppedError(diverged(state.global_step, "the validation loss"))
        if state.best_metric is None or found < state.best_metric:
            peft.save(self._model, self._out / "best.new")
            checkpoints.replace(self._out / "best.new", self._out / "best")
        self._journal.write(state.global_step, valid_loss=found)  # after the adapter: a line that is there is never measured again
        self._task.advance(0, valid_loss=found)
        self._remember_best(state)

    def stop(self) -> bool:
        """Asked after each micro-batch and each batch of a validation, each of which is a sign of life."""
        self._journal.touch()
        return self._stop()

    def _heed(self, _: int) -> None:
        if self.stop():
            raise _Interrupted

    def _remember_best(self, state: Any) -> None:
        """In HF's own fields, from the journal: a checkpoint that was saved without its validation knows less."""
        points = self._journal.points("valid_loss")
        if points:
            best = min(points, key=lambda point: point.loss)
            state.best_metric, state.best_global_step = best.loss, best.step


def _probe_longest(cfg: Config, model: Any, how: Computing, stepper: Stepper, todo: Work) -> None:
    size = hub.size(cfg.model, cfg.paths.cache)
    probe.longest(
        cfg,
        model,
        todo.rows,
        todo.accumulation,
        stepper,
        hidden=how.hidden,
        summed=_summed(cfg, how),
        gather=how.gather,
        state_bytes=standing.adapter(cfg, size)["optimizer state"],
    )


def _summed(cfg: Config, how: Computing) -> loss.Summed:
    return how.summed if cfg.kernels.loss == "ours" else loss.stock_cross_entropy


def _probe(train: Sequence[Example]) -> tuple[Example, Example]:
    """Two short records for the test of boundaries; the same one twice where there is only one."""
    shortest = sorted(train, key=lambda one: len(one.ids))
    return shortest[0], shortest[min(1, len(shortest) - 1)]


def _facts(cfg: Config, todo: Work, journal: Journal, state: Any, how: Computing) -> TrainFacts:
    tokens = int(state.num_input_tokens_seen)
    return TrainFacts(
        backend=cfg.model.backend,
        device=torch.cuda.get_device_name() if cfg.model.device == "cuda" else "cpu",
        rank=cfg.adapter.rank,
        alpha=cfg.adapter.alpha,
        dora=cfg.adapter.dora,
        rslora=cfg.adapter.rslora,
        max_tokens=cfg.data.max_tokens,
        packed=cfg.pack.enabled,
        steps=state.global_step,
        accumulation=todo.accumulation,
        num_tokens=tokens,
        wall_s=journal.wall_s,
        tokens_per_s=tokens / journal.wall_s,
        peak_bytes=memory.peak_bytes(cfg.model.device),
        train_loss=journal.points("loss"),
        valid_loss=journal.points("valid_loss"),
        best_step=state.best_global_step,
        kernels=how.active,
        pinned_bytes=how.pinned_bytes,
    )
