"""The stage table and run(): the only place that knows the order.

A stage whose key equals the published one is skipped. Keys follow from config, sources and the inputs' keys alone, so all of
them are known before anything runs: a train that another key would replace is refused before a minute is spent.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trainer import artifacts, cards, holders, oom, progress, worker
from trainer import facts as stage_facts
from trainer.artifacts import Artifact, Hashes, Label
from trainer.config import Config
from trainer.errors import DataError, DoesNotFitError, MachineError, ModelError, OutOfMemoryError, StaleError
from trainer.facts import Facts, PlanFacts, ReleaseFacts, TrainFacts
from trainer.watchdog import Watchdog

F = TypeVar("F", bound=Facts)


class StageSpec(NamedTuple):
    """needs: stages whose output it reads; sections: dotted config names in its key; in_worker: it may import torch."""

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    in_worker: bool
    does: str

    @property
    def module(self) -> Any:
        return importlib.import_module(f"trainer.stages.{self.name}")

    @property
    def facts(self) -> type[Facts]:
        kind: type[Facts] = getattr(stage_facts, f"{self.name.capitalize()}Facts")
        return kind


STAGES: tuple[StageSpec, ...] = (
    StageSpec(
        "plan",
        (),
        ("model", "data.max_tokens", "pack", "adapter", "train", "plan"),
        False,
        "say whether the run fits the card, term by term",
    ),
    StageSpec(
        "prepare",
        (),
        ("model.name", "model.revision", "data.format", "data.max_tokens", "data.valid_fraction"),
        True,
        "read, clean, split and tokenize the records",
    ),
    StageSpec("train", ("prepare",), ("model", "adapter", "train", "pack"), True, "train the adapter"),
    StageSpec("evaluate", ("prepare", "train"), ("evaluate", "export.checkpoint"), True, "base against tuned on held-out records"),
    StageSpec("export", ("train",), ("export",), True, "merge and write the q4_k_m GGUF and its Modelfile"),
    StageSpec("verify", ("prepare", "evaluate", "export"), ("verify",), False, "compare the GGUF with the tuned model, refuse or pass"),
    StageSpec("release", ("train", "evaluate", "export", "verify"), ("export",), False, "publish it in output/gguf"),
    StageSpec("report", ("prepare", "train", "evaluate", "export", "verify", "release"), (), False, "write report.html"),
)


def spec(name: str) -> StageSpec:
    return next(stage for stage in STAGES if stage.name == name)


def run(cfg: Config, goal: str, call: Callable[[int], worker.Caller] | None) -> Path:
    """Bring `goal` and everything that it needs up to date; returns the goal's directory.

    call: makes the caller of worker stages from the lock's descriptor; None runs them in this process.

    Raises:
        TrainerError: any leaf; what was published before stays.
    """
    _require_card(cfg, goal)
    with artifacts.lock(cfg.run_dir) as descriptor:
        artifacts.recover(cfg.run_dir)
        hashes = Hashes(cfg.paths.cache / "hashes.json")
        try:
            labels = _labels(cfg, goal, hashes)
            _refuse_stale_train(cfg, labels)
            caller = call(descriptor) if call else None
            done: dict[str, Artifact[Any]] = {}
            for name, label in labels.items():
                done[name] = _bring(cfg, spec(name), label, done, hashes, caller)
        finally:
            hashes.save()
    return done[goal].path


def order(goal: str) -> list[StageSpec]:
    """The goal and its transitive needs, in the order in which they run."""
    wanted = {goal}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    return [stage for stage in STAGES if stage.name in wanted]


def _labels(cfg: Config, goal: str, hashes: Hashes) -> dict[str, Label]:
    labels: dict[str, Label] = {}
    for stage in order(goal):
        labels[stage.name] = Label(
            stage=stage.name,
            version=stage.module.VERSION,
            sections=sections(cfg, stage.sections),
            sources={name: hashes.of(_present(name, path)) for name, path in stage.module.sources(cfg).items()},
            inputs={need: labels[need] for need in stage.needs},
        )
    return labels


def sections(cfg: Config, names: Sequence[str]) -> dict[str, Any]:
    """Values under the dotted names that differ from the defaults, so that a new field with a default changes no key."""
    tree = cfg.model_dump(mode="json", exclude_defaults=True)
    found: dict[str, Any] = {}
    for dotted in names:
        value: Any = tree
        for part in dotted.split("."):
            value = value.get(part, {}) if isinstance(value, Mapping) else {}
        found |= _flat(dotted, value)
    return found


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: leaf for key, part in value.items() for name, leaf in _flat(f"{prefix}.{key}", part).items()}
    return {prefix: value}


def _present(name: str, path: Path) -> Path:
    if path.exists():
        return path
    if name == "data":
        raise DataError(
            f"{path}: no such file; put your records there or name another (make: DATA=FILE, else --set data.path=FILE); data/README.md shows the formats"
        )
    raise ModelError(f"{path}: no such file or directory (the {name} that model.name names)")


def _require_card(cfg: Config, goal: str) -> None:
    needs_card = any(stage.name in {"train", "evaluate", "export"} for stage in order(goal))
    if cfg.model.device == "cuda" and needs_card and cards.count() == 0:
        raise MachineError(
            "no CUDA card found, but model.device = 'cuda'; run on a machine with an NVIDIA card and driver, "
            "or try the demo that needs none: make demo (--preset gemma3-270m-cpu)"
        )


def _refuse_stale_train(cfg: Config, labels: Mapping[str, Label]) -> None:
    """A trained adapter is hours of work: never replaced by the way."""
    label = labels.get("train")
    target = cfg.run_dir / "train"
    earlier = (artifacts.read_label(target) or artifacts.draft_label(target)) if label else None
    if label is None or earlier is None or earlier.key == label.key:
        return
    if cfg.run.fresh:
        progress.say(f"train: set aside in {artifacts.set_aside(target)} (run.fresh): {'; '.join(earlier.differences(label))}")
        return
    raise StaleError(
        f"{target} was trained under other settings or data:",
        *(f"  {line}" for line in earlier.differences(label)),
        "undo the change, or keep both: --set run.name=OTHER, or set the old one aside: --set run.fresh=true",
    )


def _bring(
    cfg: Config, stage: StageSpec, label: Label, done: Mapping[str, Artifact[Any]], hashes: Hashes, caller: worker.Caller | None
) -> Artifact[Any]:
    target = cfg.run_dir / stage.name
    if stage.name != "plan" and artifacts.read_label(target) == label:  # a plan depends on the machine, and costs nothing
        artifact = artifacts.read(target, stage.facts, hashes)
        progress.say(f"{stage.name}: up to date")
    else:
        artifact = _make(cfg, stage, label, done, hashes, caller)
    assert artifact is not None
    if isinstance(artifact.facts, ReleaseFacts):
        shown = artifacts.expose(target, cfg.paths.output / "gguf", artifact.facts.release)
        progress.say(f"release: {shown}")
    return artifact


def _make(
    cfg: Config, stage: StageSpec, label: Label, done: Mapping[str, Artifact[Any]], hashes: Hashes, caller: worker.Caller | None
) -> Artifact[Any]:
    target = cfg.run_dir / stage.name
    progress.say(f"{stage.name}: {stage.does}")
    started = time.monotonic()
    with artifacts.publish(target, label, hashes, resume=stage.name == "train") as draft:
        job = worker.Job(stage=stage.name, config=cfg, inputs={name: artifact.path for name, artifact in done.items()}, out=draft.path)
        if stage.name == "train" and caller:
            draft.facts = _train(job, caller)
        else:
            run_job = caller if stage.in_worker and caller else worker.in_process
            draft.facts = run_job(job, stage.facts)
        draft.wall_s = round(time.monotonic() - started, 2)
    progress.say(f"{stage.name}: done in {draft.wall_s:.0f} s")
    artifact: Artifact[Any] | None = artifacts.read(target, stage.facts, hashes)
    assert artifact is not None
    return artifact


def _train(job: worker.Job, caller: worker.Caller) -> TrainFacts:
    """Attempts at a training, each in a child; where memory runs out the next one stands a rung lower and goes on from the last checkpoint.

    Raises:
        OutOfMemoryError: the last rung failed, or the policy forbids the next one. DoesNotFitError: others hold the card's memory.
    """
    spec("train").module.recall(job.config, job.out)
    attempt = oom.read(job.out)
    for line in attempt.rungs:
        progress.say(f"train: given up before: {line}")
    while True:
        trying = job.model_copy(update={"config": attempt.in_force(job.config)})
        watchdog = Watchdog(job.out / "metrics.jsonl", 60 * job.config.oom.stall_minutes)
        try:
            facts = caller(trying, TrainFacts, allocator=attempt.allocator, watchdog=watchdog)
            return facts.model_copy(update={"rungs": attempt.rungs})
        except OutOfMemoryError as error:
            progress.say(error.problems[0])
            attempt = _lower(job, attempt, error, caller)


def _lower(job: worker.Job, attempt: oom.Attempt, error: OutOfMemoryError, caller: worker.Caller) -> oom.Attempt:
    """The next attempt, written beside the checkpoints that it goes on from."""
    policy = job.config.oom.policy
    step = oom.climb(job.config, attempt, attempt.allocator or caller.allocator)
    if job.config.model.device == "cuda":
        _refuse_holders(holders.on_card(caller.card), quality=step is None or step.rung.quality)
    if step is None:
        raise OutOfMemoryError(*error.problems, "nothing is left to give up:", *attempt.rungs, *_planned(job, attempt))
    if policy == "stop":
        raise OutOfMemoryError(*error.problems, f'the next rung would be {step.attempt.rungs[-1]} (oom.policy = "stop")')
    after = step.attempt
    if tokens := step.settings.get("data.max_tokens"):
        after = oom.told(step, _affordable(spec("train").module.lost(job, tokens), policy, step))
    oom.write(job.out, step, after)
    progress.say(f"train: {'starting anew' if step.rung.anew else 'going on'} with {after.rungs[-1]}")
    return after


def _refuse_holders(others: Sequence[holders.Holder], *, quality: bool) -> None:
    """What another process holds never costs quality; a desktop's few megabytes may cost speed."""
    if others and (quality or sum(one.num_bytes for one in others) >= holders.MUCH_BYTES):
        raise DoesNotFitError(
            "train: the card's memory ran out while others hold some of it; the last checkpoint is kept:", *map(str, others)
        )


def _affordable(lost: oom.Lost, policy: str, step: oom.Step) -> str:
    """What the shorter context costs, in words."""
    too_much = lost.share > oom.MOST_LOST and policy != "lossy"
    if too_much or lost.num_left_out == lost.num_records:
        raise OutOfMemoryError(
            f"train: memory ran out, and {step.change} would cost too much: {lost}",
            "to accept that: --set oom.policy=lossy; or lower adapter.rank, or take a larger card (python -m trainer plan shows what fits)",
        )
    return str(lost)


def _planned(job: worker.Job, attempt: oom.Attempt) -> Sequence[str]:
    """Shows the plan's table of what failed; returns what the plan would change."""
    with tempfile.TemporaryDirectory(prefix="trinity-") as scratch:
        plan = worker.Job(stage="plan", config=attempt.in_force(job.config), inputs={}, out=Path(scratch))
        try:
            worker.in_process(plan, PlanFacts)
        except DoesNotFitError as error:
            return error.problems
    return ()
