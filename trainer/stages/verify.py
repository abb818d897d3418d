"""verify: does the GGUF, run by llama.cpp, answer like the model that was trained? No GPU, no torch.

Links of the chain, each measured against what evaluate left of the tuned model:
    hash     the file is the one that export wrote
    tokens   llama.cpp's ids of every evaluated prompt are those that were trained on: all of them, or no release
    stop     greedy answers end by themselves nearly as often as the tuned model's did
    kl       mean KL(tuned || served) of next-token distributions, teacher-forced on the tuned model's own answers
    top1     share of positions with the same most likely token
The first three always refuse; the last two obey verify.kl. The time is bounded by verify.minutes: a probe of the speed sets how
many records are compared and answered, shortest first where not all can be.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import progress
from trainer.artifacts import Inputs
from trainer.config import Config
from trainer.errors import ArtifactError, RefusedError
from trainer.facts import EvaluateFacts, ExportFacts, Refusal, VerifyFacts
from trainer.manifest import Message, Probe
from trainer.scoring import kl_nats, same_top1, share_exact
from trainer.tokenizer import END_OF_TURN_ID, EOS_ID

if TYPE_CHECKING:
    from trainer.backends.llamacpp import Completion, Engine

VERSION = 1
CANDIDATES = 1000
"""Tokens of a served distribution that are asked for: 98 % of the mass, in a hundredth of the time that all take."""
ENDS_SHARE = 0.9
"""Answers that must end by themselves, as a share of what the tuned model's did."""
LEAST = 3
"""Records that are compared and answered however slow the machine is; a release needs as many probes."""
MOST_PROBES = 8


class Asked(NamedTuple):
    """A line of answers.jsonl."""

    id: str
    messages: list[dict[str, str]]
    prompt: str
    prompt_ids: list[int]
    expected: str
    tuned_ids: list[int]

    @property
    def tuned_ended(self) -> bool:
        return ended(self.tuned_ids)


class Compared(NamedTuple):
    num_positions: int
    kl_nats: float
    top1: float


def sources(cfg: Config) -> Mapping[str, Path]:
    return {}


def run(cfg: Config, inputs: Inputs, out: Path) -> VerifyFacts:
    """Raises:
    RefusedError: the GGUF does not answer like the tuned model; names every failed link with both numbers.
    """
    from trainer.backends.llamacpp import Engine

    started = time.monotonic()
    exported = inputs.facts(ExportFacts)
    gguf = inputs.path("export") / exported.gguf
    _require_hash(gguf, exported.gguf_sha256)
    asked = read_answers(inputs.path("evaluate") / "answers.jsonl")
    reference = read_reference(inputs.path("evaluate") / "reference" / "logprobs.npz", asked)
    clock = Clock(60 * cfg.verify.minutes)
    with Engine(gguf, num_ctx=cfg.export.num_ctx, threads=len(os.sched_getaffinity(0))) as engine:
        unequal = [one for one in asked if engine.tokenize(one.prompt, add_bos=True) != one.prompt_ids]
        compared = compare(engine, asked, reference, clock)
        served = _answer(engine, asked, cfg.evaluate.max_new_tokens, clock)
    _write_served(out / "served.jsonl", asked, served)
    _write_probes(out / "probes.jsonl", asked, served)
    facts = _facts(cfg, inputs.facts(EvaluateFacts), asked, unequal, compared, served)
    facts = facts.model_copy(update={"wall_s": time.monotonic() - started})
    return _judged(cfg, facts, refusals(facts, [asked[at] for at in served], unequal), gguf)


class Clock:
    """What is left of verify.minutes."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())


def affordable(costs: Sequence[int], seconds_a_unit: float, budget_s: float, least: int = LEAST) -> int:
    """How many of the pieces of work, in their order, fit the budget; never less than `least` of them."""
    total = 0.0
    for count, cost in enumerate(costs):
        total += cost * seconds_a_unit
        if total > budget_s and count >= least:
            return count
    return len(costs)


def ended(ids: Sequence[int]) -> bool:
    """Whether an answer was ended by its model, not by a limit."""
    return bool(ids) and ids[-1] in (END_OF_TURN_ID, EOS_ID)


def refusals(facts: VerifyFacts, answered: Sequence[Asked], unequal: Sequence[Asked]) -> list[Refusal]:
    """Every link that failed, with both numbers."""
    found = []
    if unequal:
        message = (
            f"llama.cpp's token ids differ from those the model was trained on for {len(unequal)} of {facts.num_prompts} prompts (allowed: 0), "
            f"the first: {unequal[0].prompt[:80]!r}; the GGUF's vocabulary is not the one that prepare used: run again from prepare"
        )
        found.append(Refusal(link="tokens", message=message))
    least = ENDS_SHARE * sum(one.tuned_ended for one in answered) / len(answered)
    if facts.ends < least:
        message = (
            f"{facts.ends:.1%} of {len(answered)} answers ended by themselves, where at least {least:.1%} must "
            f"({ENDS_SHARE:g} of what the tuned model's did); it would talk on and on: export again"
        )
        found.append(Refusal(link="stop", message=message))
    advice = "the merge or the quantisation changed the model: export again; --set verify.kl=warn publishes it as it is, marked unverified"
    if facts.kl_nats > facts.max_kl_nats:
        measured = (
            f"mean KL(tuned || served) is {facts.kl_nats:.4g} nats over {facts.num_positions} positions (limit {facts.max_kl_nats:g})"
        )
        message = f"{measured}; {advice}"
        found.append(Refusal(link="kl", message=message))
    if facts.top1_agreement < facts.min_top1:
        measured = (
            f"the most likely token agrees at {facts.top1_agreement:.1%} of {facts.num_positions} positions (limit {facts.min_top1:.1%})"
        )
        message = f"{measured}; {advice}"
        found.append(Refusal(link="top1", message=message))
    return found


def _judged(cfg: Config, facts: VerifyFacts, failed: Sequence[Refusal], gguf: Path) -> VerifyFacts:
    waived = [refusal for refusal in failed if refusal.link in ("kl", "top1") and cfg.verify.kl == "warn"]
    if len(failed) > len(waived):
        raise RefusedError(
            *(f"{refusal.link}: {refusal.message}" for refusal in failed), f"no release; the GGUF and its Modelfile stay in {gguf.parent}"
        )
    for refusal in waived:
        progress.say(f"verify: waived (verify.kl=warn): {refusal.link}: {refusal.message}")
    return facts.model_copy(update={"verified": not waived, "waived": tuple(waived)})


def _facts(
    cfg: Config,
    evaluated: EvaluateFacts,
    asked: Sequence[Asked],
    unequal: Sequence[Asked],
    compared: Compared,
    served: Mapping[int, Completion],
) -> VerifyFacts:
    said = [answer.text for answer in served.values()]
    shown = [served[at].text if at in served else "" for at in range(len(evaluated.answers))]
    exact = share_exact([asked[at].expected for at in served], said) if cfg.evaluate.exact_match else None
    return VerifyFacts(
        num_prompts=len(asked),
        ids_equal=1 - len(unequal) / len(asked),
        num_positions=compared.num_positions,
        kl_nats=compared.kl_nats,
        top1_agreement=compared.top1,
        max_kl_nats=cfg.verify.max_kl_nats,
        min_top1=cfg.verify.min_top1,
        ends=sum(ended(answer.ids) for answer in served.values()) / len(served),
        num_answers=len(served),
        exact_match_served=exact,
        served_answers=tuple(shown),
        verified=True,
        wall_s=0.0,
    )


# --- measuring


def compare(engine: Engine, asked: Sequence[Asked], reference: Mapping[int, list[dict[int, float]]], clock: Clock) -> Compared:
    """Next-token distributions along the tuned model's own answers, within half of the time that is left."""
    order = sorted(reference, key=lambda at: len(asked[at].prompt_ids) + len(reference[at]))
    costs = [len(asked[at].prompt_ids) + len(reference[at]) for at in order]
    engine.next_logprobs(asked[order[0]].prompt_ids, 1)  # the first one pulls the weights from the disk
    budget_s = clock.left_s / 2
    kl: list[float] = []
    same: list[bool] = []
    count, started = len(order), time.monotonic()
    with progress.task("comparing with the tuned model", len(order), "answers") as task:
        for done, at in enumerate(order):
            if done == count:
                break
            for position, distribution in enumerate(reference[at]):
                found = engine.next_logprobs([*asked[at].prompt_ids, *asked[at].tuned_ids[:position]], CANDIDATES)
                kl.append(kl_nats(distribution, found))
                same.append(same_top1(distribution, found))
            task.advance(kl_nats=sum(kl) / len(kl))
            if done == 0:
                count = affordable(costs, (time.monotonic() - started) / costs[0], budget_s)
    return Compared(len(kl), sum(kl) / len(kl), sum(same) / len(same))


def _answer(engine: Engine, asked: Sequence[Asked], max_new_tokens: int, clock: Clock) -> dict[int, Completion]:
    """Greedy answers of the GGUF, by number of the record, to those that the tuned model answered: all if there is time."""
    candidates = [at for at, one in enumerate(asked) if one.tuned_ids]
    order = sorted(candidates, key=lambda at: len(asked[at].prompt_ids))
    costs = [len(asked[at].prompt_ids) + max_new_tokens for at in order]
    served: dict[int, Completion] = {}
    with progress.task("answering with the GGUF", len(order), "answers") as task:
        started = time.monotonic()
        for first, last in ((0, LEAST), (LEAST, len(order))):
            if served:
                speed = (time.monotonic() - started) / sum(costs[:LEAST])
                last = LEAST + affordable(costs[LEAST:], speed, clock.left_s, least=0)  # noqa: PLW2901  # cut to the time
            answers = engine.complete_all([asked[at].prompt_ids for at in order[first:last]], max_new_tokens, task.advance)
            served |= dict(zip(order[first:last], answers, strict=True))
    return dict(sorted(served.items()))


# --- reading and writing


def read_answers(path: Path) -> list[Asked]:
    with path.open(encoding="utf-8") as lines:  # not splitlines(): a text may hold other line separators
        entries = [json.loads(line) for line in lines]
    asked = [Asked(**{name: entry[name] for name in Asked._fields}) for entry in entries]
    if sum(bool(one.tuned_ids) for one in asked) < LEAST:
        raise ArtifactError(
            f"{path}: fewer than {LEAST} records with answers of the tuned model; "
            "hold out more records (data.valid_fraction) and evaluate again"
        )
    return asked


def read_reference(path: Path, asked: Sequence[Asked]) -> dict[int, list[dict[int, float]]]:
    """By number of the record: the tuned model's distribution at each token of its own answer."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        columns = [arrays[name] for name in ("record", "position", "ids", "logprobs")]
    reference: dict[int, list[dict[int, float]]] = {}
    for record, position, ids, logprobs in zip(*columns, strict=True):
        entry = reference.setdefault(int(record), [])
        if len(entry) != position or position >= len(asked[int(record)].tuned_ids):
            raise ArtifactError(
                f"{path}: position {position} of record {record} is out of order or beyond its answer; run the stage evaluate again"
            )
        entry.append(dict(zip(ids.tolist(), logprobs.tolist(), strict=True)))
    return reference


def _require_hash(gguf: Path, wanted: str) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise RefusedError(
            f"hash: {gguf} is not the file that export wrote (sha256 {found[:12]}..., written {wanted[:12]}...); "
            f"delete {gguf.parent} and run the stage export again"
        )


def _write_served(path: Path, asked: Sequence[Asked], served: Mapping[int, Completion]) -> None:
    _write_lines(
        path,
        [
            {
                "id": asked[at].id,
                "prompt": asked[at].prompt,
                "expected": asked[at].expected,
                "answer": answer.text,
                "ended": ended(answer.ids),
            }
            for at, answer in served.items()
        ],
    )


def _write_probes(path: Path, asked: Sequence[Asked], served: Mapping[int, Completion]) -> None:
    """A few served answers, those that ended first: another engine must end them too."""
    chosen = sorted(served, key=lambda at: (not ended(served[at].ids), at))[:MOST_PROBES]
    probes = [
        Probe(
            messages=tuple(Message.model_validate(message) for message in asked[at].messages),
            prompt=asked[at].prompt,
            prompt_ids=tuple(asked[at].prompt_ids),
            answer=served[at].text,
        )
        for at in chosen
    ]
    _write_lines(path, [probe.model_dump(mode="json") for probe in probes])


def _write_lines(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
