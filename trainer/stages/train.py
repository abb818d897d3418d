"""train: prepared records -> a PEFT adapter, the last one and the best one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.artifacts import Inputs
from trainer.config import Config
from trainer.facts import TrainFacts

VERSION = 3


def sources(cfg: Config) -> Mapping[str, Path]:
    """Nothing outside output/: the base model's name and revision are config, its bytes are checked in the cache."""
    return {}


def run(cfg: Config, inputs: Inputs, out: Path) -> TrainFacts:
    from trainer.dataset import records
    from trainer.training import loop
    from trainer.training.batches import examples

    prepared = inputs.path("prepare")
    return loop.run(cfg, examples(records.read(prepared / "train.jsonl")), examples(records.read(prepared / "valid.jsonl")), out)
