"""prepare: the user's file -> train.jsonl and valid.jsonl, one tokenized record a line, with tokenizer.json and dropped.jsonl beside them.

Everything that is wrong with the file is reported before the tokenizer is even fetched. Records stream from Arrow through
the tokenizer to disk in batches; what stays in memory is a hash and a length a record.
"""

from __future__ import annotations

import itertools
import json
import shutil
from array import array
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TextIO

from tokenizers import Tokenizer

import trainer.tokenizer
from trainer import progress
from trainer.artifacts import Inputs
from trainer.backends import datasets, hub
from trainer.config import Config
from trainer.dataset import clean, fit, formats, pack, records, split, template
from trainer.dataset.records import Record
from trainer.errors import DataError
from trainer.facts import PrepareFacts

VERSION = 1
BATCH = 1000
"""Records that are tokenized at once."""
TRAIN, VALID = "train.jsonl", "valid.jsonl"


def sources(cfg: Config) -> Mapping[str, Path]:
    """The user's file, and the tokenizer of a model that is a directory: other ids come out when either changes."""
    found = {"data": cfg.data.path}
    tokenizer = Path(cfg.model.name) / "tokenizer.json"
    return {**found, "tokenizer": tokenizer} if tokenizer.is_file() else found


def run(cfg: Config, inputs: Inputs, out: Path) -> PrepareFacts:
    """See the module.

    Raises:
        DataError: no file, problems in it (all of them), or too little left to train on.
    """
    path = cfg.data.path
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; put your conversations there, or name another file "
            "(make: DATA=FILE, else --set data.path=FILE): see data/README.md"
        )
    reader = formats.Reader(path, cfg.data.format)
    with datasets.spooled(reader, cfg.paths.cache) as spool:
        reader.check()
        file = hub.tokenizer_json(cfg.model, cfg.paths.cache)
        shutil.copyfile(file, out / "tokenizer.json")
        with (out / "dropped.jsonl").open("w", encoding="utf-8", newline="\n") as dropped, Sides(out, cfg.data.valid_fraction) as sides:
            preparing = Preparing(trainer.tokenizer.load(file), cfg.data.max_tokens, dropped)
            with progress.task("prepare", total=len(spool), unit="records") as task:
                for batch in spool.batches(BATCH):
                    for record in preparing.records(batch):
                        sides.add(record)
                    task.advance(len(batch))
    if not all(sides.lengths.values()):
        sides = _split_again(sides, path)
    return _facts(reader.format, preparing, sides, cfg.data.max_tokens)


class Preparing:
    """Turns batches of conversations into records, noting in `dropped` what was changed or left out and counting it."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, dropped: TextIO) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._dropped = dropped
        self._seen: set[bytes] = set()
        self.num_duplicates = self.num_shortened = self.num_left_out = 0

    def records(self, batch: Sequence[tuple[int, Sequence[template.Message]]]) -> Iterator[Record]:
        fresh = list(self._fresh(batch))
        encoded = template.encode_batch(self._tokenizer, [messages for _, messages in fresh])
        for (line, messages), (ids, spans) in zip(fresh, encoded, strict=True):
            if len(ids) <= self._max_tokens:
                yield Record(records.prompt_id(messages), line, messages, ids, spans)
            elif shorter := self._shorter(line, messages, len(ids)):
                yield shorter

    def _fresh(self, batch: Sequence[tuple[int, Sequence[template.Message]]]) -> Iterator[tuple[int, Sequence[template.Message]]]:
        """Cleaned conversations that were not seen before."""
        for line, raw in batch:
            messages = clean.answered(template.clean(raw))
            if raw[-1]["role"] != "assistant":
                self._note(line, "unanswered last turn", kept=True)
            mark = records.fingerprint(messages)
            if mark in self._seen:
                self.num_duplicates += 1
                self._note(line, "duplicate", kept=False)
            else:
                self._seen.add(mark)
                yield line, messages

    def _shorter(self, line: int, messages: Sequence[template.Message], num_tokens: int) -> Record | None:
        record = fit.shorter(self._tokenizer, line, messages, self._max_tokens)
        if record is None:
            self.num_left_out += 1
            self._note(line, "too long", kept=False, tokens=num_tokens)
            return None
        self.num_shortened += 1
        self._note(line, "shortened", kept=True, tokens=num_tokens, turns_dropped=len(messages) - len(record.messages))
        return record

    def _note(self, line: int, why: str, *, kept: bool, **figures: int) -> None:
        self._dropped.write(json.dumps({"line": line, "why": why, "kept": kept, **figures}) + "\n")


class Sides:
    """train.jsonl and valid.jsonl, written record by record, with what is counted on the way."""

    def __init__(self, out: Path, fraction: float, held_out: Container[str] | None = None) -> None:
        """held_out: the ids of the valid side, where they are known; else each id's hash decides."""
        self.out = out
        self.fraction = fraction
        self._held_out = held_out
        self.lengths = {name: array("I") for name in (TRAIN, VALID)}
        self.num_supervised_tokens = 0

    def __enter__(self) -> Self:
        self._files = {name: (self.out / name).open("w", encoding="utf-8", newline="\n") for name in (TRAIN, VALID)}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, record: Record) -> None:
        valid = split.is_valid(record.id, self.fraction) if self._held_out is None else record.id in self._held_out
        side = VALID if valid else TRAIN
        self._files[side].write(record.to_json() + "\n")
        self.lengths[side].append(len(record.ids))
        if not valid:
            self.num_supervised_tokens += sum(end - start for start, end in record.spans)


def _split_again(sides: Sides, path: Path) -> Sides:
    """Chance can leave a side of a small file empty: split once more, this time knowing all ids."""
    everything = sorted((record for name in (TRAIN, VALID) for record in records.read(sides.out / name)), key=lambda record: record.line)
    ids = {record.id for record in everything}
    if len(ids) < 2:
        raise DataError(
            f"{path}: {len(everything)} usable records, {len(ids)} different prompts, but at least two are needed, since one is held out "
            "to measure on; add records, or raise data.max_tokens if they were too long"
        )
    with Sides(sides.out, sides.fraction, split.held_out(ids, sides.fraction)) as again:
        for record in everything:
            again.add(record)
    return again


def _facts(source_format: str, preparing: Preparing, sides: Sides, max_tokens: int) -> PrepareFacts:
    train, valid = sides.lengths[TRAIN], sides.lengths[VALID]
    num_rows = len(pack.pack(train, max_tokens))
    return PrepareFacts(
        source_format=source_format,
        num_train=len(train),
        num_valid=len(valid),
        num_train_tokens=sum(train),
        num_supervised_tokens=sides.num_supervised_tokens,
        num_valid_tokens=sum(valid),
        longest_tokens=max(itertools.chain(train, valid)),
        num_shortened=preparing.num_shortened,
        num_left_out=preparing.num_left_out,
        num_duplicates=preparing.num_duplicates,
        num_rows_packed=num_rows,
        pack_fill=pack.fill(train, num_rows, max_tokens),
    )
