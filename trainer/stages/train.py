"""train: prepared records -> a PEFT adapter, the last one and the best one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from trainer import artifacts, tokenizer
from trainer.artifacts import Inputs
from trainer.config import Config
from trainer.dataset import fit, records
from trainer.dataset.records import Record
from trainer.facts import TrainFacts
from trainer.oom import ATTEMPT, Lost

VERSION = 3


def sources(cfg: Config) -> Mapping[str, Path]:
    """Nothing outside output/: the base model's name and revision are config, its bytes are checked in the cache."""
    return {}


def run(cfg: Config, inputs: Inputs, out: Path) -> TrainFacts:
    from trainer.training import loop, room
    from trainer.training.batches import examples

    room.require(cfg)
    train, valid = _records(inputs, cfg.data.max_tokens)
    return loop.run(cfg, examples(train), examples(valid), out)


def recall(cfg: Config, out: Path) -> None:
    """On a fresh machine: what the mirrored training had given up for want of memory, before it is restored and goes on so.

    out: where the training is made, whose key is known already.
    """
    label = artifacts.draft_label(out.with_suffix(""))
    if cfg.checkpoint.mirror is None or label is None or (out / "checkpoints").is_dir():
        return
    from trainer.training import mirror

    attempt = mirror.companion(cfg.checkpoint.mirror / cfg.run.name, label.key, ATTEMPT)
    if attempt is not None:
        artifacts.write_whole(out / ATTEMPT, attempt)


def lost(inputs: Inputs, max_tokens: int) -> Lost:
    """What training at a shorter context than was prepared would lose."""
    prepared = inputs.path("prepare")
    return fit.lost(records.read(prepared / "train.jsonl"), tokenizer.load(prepared / "tokenizer.json"), max_tokens)


def _records(inputs: Inputs, max_tokens: int) -> tuple[Iterator[Record], Iterator[Record]]:
    """Both sides at the context in force; out of memory may have made it shorter than prepare's."""
    prepared = inputs.path("prepare")
    reader = tokenizer.load(prepared / "tokenizer.json")

    def side(name: str) -> Iterator[Record]:
        return fit.fitting(records.read(prepared / name), reader, max_tokens)

    held_out = {record.id for record in side("valid.jsonl")}  # a record that lost its beginning may ask what is held out
    return (record for record in side("train.jsonl") if record.id not in held_out), side("valid.jsonl")
