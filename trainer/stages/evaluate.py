"""evaluate: base against tuned on held-out records, and what verify needs to recognise the tuned model in a GGUF.

The adapter says what it is (adapter_config.json); cfg.adapter and cfg.train are not read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import progress
from trainer.artifacts import Inputs
from trainer.config import Config
from trainer.facts import Answer, EvaluateFacts, TrainFacts
from trainer.scoring import share_exact

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trainer.dataset.records import Record

VERSION = 2
TOP = 256
"""Log-probabilities that are kept of each next-token distribution."""
SHOWN = 8
"""Answers that go into the facts, for the report."""


class Question(NamedTuple):
    """A held-out record as prompt and expected answer."""

    record: Record
    prompt: str
    ids: list[int]
    expected: str


def sources(cfg: Config) -> Mapping[str, Path]:
    return {}


def run(cfg: Config, inputs: Inputs, out: Path) -> EvaluateFacts:
    from trainer import tokenizer as tokenizers
    from trainer.backends import bitsandbytes, peft
    from trainer.training import measure, model

    started = time.monotonic()
    prepared = inputs.path("prepare")
    tokenizer = tokenizers.load(prepared / "tokenizer.json")
    held_out, questions = _questions(prepared / "valid.jsonl", tokenizer, cfg.evaluate.max_records)
    folder = inputs.path("train") / ("best" if cfg.export.checkpoint == "best" else "adapter")
    state = model.nf4(cfg)
    bitsandbytes.require_same(state, inputs.facts(TrainFacts).base_sha256)
    tuned = peft.load(model.base(cfg, state), folder, base_name=cfg.model.name)
    with measure.evaluating(tuned), peft.frozen_norms(tuned):
        found = _measure(cfg, tuned, questions, tokenizer, out)
    expected = [question.expected for question in questions]
    exact = cfg.evaluate.exact_match
    return EvaluateFacts(
        num_records=len(questions),
        loss_base=found.loss_base,
        loss_tuned=found.loss_tuned,
        exact_match_base=share_exact(expected, found.base) if exact else None,
        exact_match_tuned=share_exact(expected, found.tuned) if exact else None,
        num_reference=found.num_reference,
        num_held_out=held_out,
        answers=tuple(
            Answer(prompt=_turns(question.record)[-1]["content"], expected=question.expected, base=base, tuned=said)
            for question, base, said in zip(questions[:SHOWN], found.base, found.tuned, strict=False)
        ),
        wall_s=time.monotonic() - started,
    )


class _Found(NamedTuple):
    loss_base: float
    loss_tuned: float
    base: list[str]
    tuned: list[str]
    num_reference: int


def _measure(cfg: Config, tuned: Any, questions: Sequence[Question], tokenizer: Tokenizer, out: Path) -> _Found:
    """Both models on all questions; writes answers.jsonl and reference/. Answers of the reference records are always made."""
    from trainer.backends import peft
    from trainer.training import measure
    from trainer.training.batches import examples, row

    settings = cfg.evaluate
    num_reference = min(settings.reference_records, len(questions))
    asked = questions if settings.exact_match else questions[:num_reference]
    rows = [row(one) for one in examples(question.record for question in questions)]
    losses, said = {}, {}
    for who in ("base", "tuned"):
        with peft.base_alone(tuned) if who == "base" else nullcontext():
            with progress.task(f"loss of {who}", len(rows), "records") as task:
                losses[who] = measure.loss(tuned, rows, settings.batch_records, task.advance)
            asks = [] if who == "base" and not settings.exact_match else asked
            with progress.task(f"answers of {who}", len(asks), "answers") as task:
                said[who] = measure.answers(
                    tuned,
                    [ask.ids for ask in asks],
                    max_new_tokens=settings.max_new_tokens,
                    batch_rows=settings.batch_records,
                    advance=task.advance,
                )
    _write_reference(tuned, asked[:num_reference], said["tuned"][:num_reference], out)
    texts = {who: [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers] for who, answers in said.items()}
    _write_answers(questions, texts, said["tuned"], out / "answers.jsonl")
    return _Found(losses["base"], losses["tuned"], texts["base"], texts["tuned"], num_reference)


def _write_reference(tuned: Any, questions: Sequence[Question], answers: Sequence[Sequence[int]], out: Path) -> None:
    import numpy as np

    from trainer.training import measure

    with progress.task("reference distributions", len(questions), "answers") as task:
        found = measure.reference(tuned, [question.ids for question in questions], answers, top=TOP, advance=task.advance)
    (out / "reference").mkdir()
    np.savez(out / "reference" / "logprobs.npz", **found._asdict())


def _write_answers(
    questions: Sequence[Question], texts: Mapping[str, Sequence[str]], tuned_ids: Sequence[Sequence[int]], file: Path
) -> None:
    with file.open("w", encoding="utf-8") as handle:
        for number, question in enumerate(questions):
            line = {
                "id": question.record.id,
                "messages": _turns(question.record),
                "prompt": question.prompt,
                "prompt_ids": question.ids,
                "expected": question.expected,
                "base": texts["base"][number] if number < len(texts["base"]) else "",
                "tuned": texts["tuned"][number] if number < len(texts["tuned"]) else "",
                "tuned_ids": tuned_ids[number] if number < len(tuned_ids) else [],
            }
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _questions(valid: Path, tokenizer: Tokenizer, most: int) -> tuple[int, list[Question]]:
    """How many records are held out, and the sample of those that is asked: the smallest ids, which are hashes of content."""
    from trainer.dataset import records

    found = sorted(records.read(valid), key=lambda record: record.id)
    return len(found), [_question(record, tokenizer) for record in found[:most]]


def _question(record: Record, tokenizer: Tokenizer) -> Question:
    from trainer.dataset import template
    from trainer.tokenizer import BOS_ID

    prompt = template.render(_turns(record), generation=True)
    ids = [BOS_ID, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    return Question(record, prompt, ids, record.messages[-1]["content"])


def _turns(record: Record) -> list[Any]:
    """All but the final assistant turn."""
    return list(record.messages[:-1])
