"""The stage table and run(): the only place that knows the order.

A stage whose key equals the published one is skipped. Keys follow from config, sources and the inputs' keys alone, so all of
them are known before anything runs: a train that another key would replace is refused before a minute is spent.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trainer import artifacts, cards, progress, worker
from trainer import facts as stage_facts
from trainer.artifacts import Artifact, Hashes, Label
from trainer.config import Config
from trainer.errors import DataError, MachineError, ModelError, StaleError
from trainer.facts import Facts, ReleaseFacts

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
        run_job = caller if stage.in_worker and caller else worker.in_process
        draft.facts = run_job(job, stage.facts)
        draft.wall_s = round(time.monotonic() - started, 2)
    progress.say(f"{stage.name}: done in {draft.wall_s:.0f} s")
    artifact: Artifact[Any] | None = artifacts.read(target, stage.facts, hashes)
    assert artifact is not None
    return artifact
