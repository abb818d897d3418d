"""One report.html from what the stages measured: no script, no request, readable offline, on a phone and on paper.

Every figure is taken from facts or the release's manifest.json; nothing is measured here. Text from records and models is
escaped where it enters the page (_cell, _card, _definitions), so that an answer full of markup is shown as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import NamedTuple

from trainer.artifacts import RECORD, Inputs, Record
from trainer.config import Adapter, Config
from trainer.facts import Answer, EvaluateFacts, ExportFacts, LossPoint, PrepareFacts, ReleaseFacts, ReportFacts, TrainFacts, VerifyFacts
from trainer.manifest import Manifest
from trainer.progress import duration
from trainer.scoring import exact_match

VERSION = 1

NUM_ANSWERS = 12
MAX_CHARS = 1200
"""Of one text in the table of answers."""
LONG_CHARS = 80
"""A longer text may be cut by the table on a screen; pointing at it shows the whole."""
LOG_FROM = 30.0
"""A loss that falls by more than this factor is drawn on a logarithmic scale."""
STAGES = ("prepare", "train", "evaluate", "export", "verify", "release")


class Story(NamedTuple):
    """All that the report tells."""

    prepare: PrepareFacts
    train: TrainFacts
    evaluate: EvaluateFacts
    export: ExportFacts
    verify: VerifyFacts
    release: ReleaseFacts
    manifest: Manifest
    wall_s: Mapping[str, float]


def sources(cfg: Config) -> Mapping[str, Path]:
    return {}


def run(cfg: Config, inputs: Inputs, out: Path) -> ReportFacts:
    data = page(read(inputs)).encode("utf-8")
    (out / "report.html").write_bytes(data)
    return ReportFacts(html_bytes=len(data))


def read(inputs: Inputs) -> Story:
    manifest = Manifest.model_validate_json((inputs.path("release") / "manifest.json").read_bytes())
    records = {stage: Record.model_validate_json((inputs.path(stage) / RECORD).read_bytes()) for stage in STAGES}
    return Story(
        prepare=inputs.facts(PrepareFacts),
        train=inputs.facts(TrainFacts),
        evaluate=inputs.facts(EvaluateFacts),
        export=inputs.facts(ExportFacts),
        verify=inputs.facts(VerifyFacts),
        release=inputs.facts(ReleaseFacts),
        manifest=manifest,
        wall_s={stage: record.wall_s for stage, record in records.items()},
    )


def page(story: Story) -> str:
    here = Path(__file__)
    cards = (_curve(story), _scores(story), _parity(story), _answers(story), _times(story), _memory(story), _serving(story), _origin(story))
    body = f'{_head(story)}<div class="grid">{"".join(cards)}</div>{_foot(story)}'
    template = Template(here.with_name("report.html").read_text(encoding="utf-8"))
    css = here.with_name("report.css").read_text(encoding="utf-8")
    return template.substitute(title=escape(f"{story.release.release}: Trinity report"), css=css, body=body)


# The headline


def _head(story: Story) -> str:
    made = f"{story.release.release}, {story.manifest.created:%Y-%m-%d %H:%M %Z}".strip()
    verified = story.verify.verified
    words = "Verified: what is served answers like what was trained" if verified else "Not verified: released although a check was waived"
    verdict = f'<p class="verdict {"good" if verified else "warn"}">{words}</p>'
    top = f'<div class="top"><div class="mark"><i></i><i></i><i></i>Trinity</div><div class="when">{escape(made)}</div></div>'
    return f"<header>{top}{verdict}<h1>{escape(_sentence(story))}</h1>{_steps(story)}</header>"


def _sentence(story: Story) -> str:
    scores, served = story.evaluate, story.verify.exact_match_served
    if scores.exact_match_base is None or served is None:
        return f"Training took the held-out loss from {_nats(scores.loss_base)} to {_nats(scores.loss_tuned)} nats a token"
    kind = story.export.quantization
    return f"The {kind} model answers {_percent(served)} of held-out prompts exactly; before training it was {_percent(scores.exact_match_base)}"


def _steps(story: Story) -> str:
    """Base, tuned and served in large figures: exact match where it was measured, else the loss."""
    scores, served = story.evaluate, story.verify.exact_match_served
    num = f"{story.verify.num_answers:,} held-out answers"
    if scores.exact_match_base is None or scores.exact_match_tuned is None or served is None:
        num = f"loss on {scores.num_records:,} held-out records"
        steps = [("base", _nats(scores.loss_base), f"Base model, {num}"), ("tuned", _nats(scores.loss_tuned), f"With the adapter, {num}")]
    else:
        asked = f"{scores.num_records:,} held-out answers"
        steps = [
            ("base", _percent(scores.exact_match_base), f"Base model, {asked}"),
            ("tuned", _percent(scores.exact_match_tuned), f"With the adapter, {asked}"),
            ("served", _percent(served), f"The GGUF in llama.cpp, {num}"),
        ]
    cells = [f'<div class="step {tone}"><b>{figure}</b><span>{words}</span></div>' for tone, figure, words in steps]
    return f'<div class="steps{" two" if len(steps) == 2 else ""}">{"<div class=arrow aria-hidden=true>→</div>".join(cells)}</div>'


# The loss curve


class Axis(NamedTuple):
    """A scale from values to shares of the drawing, 0..1."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _curve(story: Story) -> str:
    train, valid = _finite(story.train.train_loss), _finite(story.train.valid_loss)
    points = [*train, *valid]
    if not points:
        return _card("wide", "Loss", "No loss was recorded.", "")
    x = Axis(0, max(1, *(point.step for point in points)))
    y, ticks = _loss_axis([point.loss for point in points])
    marks = "".join(f'<span style="top:{_share(1 - y.at(tick))}">{tick:g}</span>' for tick in ticks)
    steps = "".join(f'<span style="left:{_share(x.at(step))}">{step:,}</span>' for step in _step_ticks(int(x.high)))
    plot = (
        f'<div class="plot"><div class="ys">{marks}</div><div class="area" role="img" aria-label="{_described(train, valid)}">'
        f"{_lines(train, valid, x, y, ticks)}{_dots(valid, story.train.best_step, x, y)}</div>"
        f'<div class="xs">{steps}</div><div class="unit">optimizer steps</div></div>'
    )
    legend = '<div class="legend"><span class="base">training</span><span class="tuned">validation, full dot: best</span></div>'
    note = f"Mean over supervised tokens, nats{'; logarithmic scale' if y.log else ''}. Best validation loss at step {story.train.best_step:,}."
    return _card("wide", "Loss", note, plot + legend)


def _finite(points: Sequence[LossPoint]) -> list[LossPoint]:
    return [point for point in points if math.isfinite(point.loss)]


def _described(train: Sequence[LossPoint], valid: Sequence[LossPoint]) -> str:
    named = (("training", train), ("validation", valid))
    return "; ".join(f"{name} loss from {_nats(points[0].loss)} to {_nats(points[-1].loss)}" for name, points in named if points)


def _loss_axis(losses: Sequence[float]) -> tuple[Axis, list[float]]:
    """The axis and its marks: powers of ten where the loss falls far, else round numbers from zero."""
    high, positive = max(losses), [loss for loss in losses if loss > 0]
    low = min(positive, default=0.0)
    if low and high / low > LOG_FROM:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        axis = Axis(low * 0.8, high * 1.15, log=True)
        marks = (factor * 10.0**exponent for exponent in exponents for factor in (1, 3))
        return axis, [mark for mark in marks if axis.low <= mark <= axis.high]
    step = _round_step(high or 1.0)
    top = step * math.ceil((high or 1.0) / step)
    return Axis(0.0, top), [step * i for i in range(round(top / step) + 1)]


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that about five of them make the span."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _step_ticks(last: int) -> list[int]:
    step = max(1, int(_round_step(last)))
    return [*(tick for tick in range(0, last, step) if last - tick > step / 2), last]


def _lines(train: Sequence[LossPoint], valid: Sequence[LossPoint], x: Axis, y: Axis, ticks: Iterable[float]) -> str:
    """The stretched part, in thousandths: lines keep their width, marks and words are HTML so that they keep their shape."""
    fixed = 'vector-effect="non-scaling-stroke"'
    rules = "".join(
        f'<line class="rule" {fixed} x1="0" x2="1000" y1="{h:.1f}" y2="{h:.1f}"/>' for h in (1000 * (1 - y.at(t)) for t in ticks)
    )
    curves = ""
    for name, points in (("train", train), ("valid", valid)):
        path = " ".join(f"{1000 * x.at(point.step):.1f},{1000 * (1 - y.at(point.loss)):.1f}" for point in points)
        curves += f'<polyline class="{name}" {fixed} points="{path}"/>' if points else ""
    return f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{rules}{curves}</svg>'


def _dots(valid: Sequence[LossPoint], best: int, x: Axis, y: Axis) -> str:
    return "".join(
        f'<i class="dot{" best" if point.step == best else ""}" title="step {point.step:,}: {_nats(point.loss)}" '
        f'style="left:{_share(x.at(point.step))};top:{_share(1 - y.at(point.loss))}"></i>'
        for point in valid
    )


# Figures


def _scores(story: Story) -> str:
    scores, verify = story.evaluate, story.verify
    parts = ""
    if scores.exact_match_base is not None and scores.exact_match_tuned is not None:
        shares = [("base", scores.exact_match_base), ("tuned", scores.exact_match_tuned)]
        shares += [("served", verify.exact_match_served)] if verify.exact_match_served is not None else []
        parts += "<h3>Exact answers</h3>" + _bars((name, name, share, _percent(share)) for name, share in shares)
    worst = max(scores.loss_base, scores.loss_tuned) or 1.0
    losses = (("base", scores.loss_base), ("tuned", scores.loss_tuned))
    parts += "<h3>Loss, nats a token</h3>" + _bars((name, name, loss / worst, _nats(loss)) for name, loss in losses)
    note = f"{scores.num_records:,} of {scores.num_held_out:,} held-out records; none of their prompts was trained on."
    return _card("narrow", "Held-out records", note, f"<div>{parts}</div>")


def _bars(rows: Iterable[tuple[str, str, float, str]]) -> str:
    """Rows of (tone, name, share of the full width, words)."""
    cells = (
        f'<div class="bar {tone}"><span class="name">{escape(name)}</span><span class="track">{_fill(share)}</span>'
        f'<span class="num">{escape(words)}</span></div>'
        for tone, name, share, words in rows
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def _fill(share: float) -> str:
    return f'<span class="fill" style="width:{_share(share)}"></span>' if share > 0 else ""


def _parity(story: Story) -> str:
    v = story.verify
    kl_scale = max(v.kl_nats, v.max_kl_nats) * 1.25
    checks = (
        _check(
            "Same prompt tokens",
            v.ids_equal,
            1.0,
            _percent(v.ids_equal),
            f"of {v.num_prompts:,} prompts, engine against trainer; all must be",
            v.ids_equal < 1,
        ),
        _check(
            "Divergence",
            v.kl_nats / kl_scale,
            v.max_kl_nats / kl_scale,
            f"{_nats(v.kl_nats)} nats",
            f"mean KL over {v.num_positions:,} positions; at most {_nats(v.max_kl_nats)}",
            v.kl_nats > v.max_kl_nats,
        ),
        _check(
            "Same first choice",
            v.top1_agreement,
            v.min_top1,
            _percent(v.top1_agreement),
            f"of next tokens; at least {_percent(v.min_top1)}",
            v.top1_agreement < v.min_top1,
        ),
        _check("Ended by itself", v.ends, None, _percent(v.ends), f"of {v.num_answers:,} greedy answers", False),
    )
    waived = "".join(f'<p class="waived"><b>{escape(refusal.link)}</b> waived: {escape(refusal.message)}</p>' for refusal in v.waived)
    note = "The GGUF in llama.cpp against the tuned model, on the same prompts. The mark on each bar is its limit."
    return _card("", "Is what is served what was trained?", note, f'<div class="checks">{"".join(checks)}</div>{waived}')


def _check(title: str, share: float, limit: float | None, figure: str, words: str, over: bool) -> str:
    mark = "" if limit is None else f'<i class="limit" style="left:{_share(limit)}"></i>'
    bar = f'<div class="track">{_fill(share)}{mark}</div>'
    return f'<div class="check{" over" if over else ""}"><h3>{title}</h3><b>{figure}</b>{bar}<span>{words}</span></div>'


# Answers side by side


def _answers(story: Story) -> str:
    answers = story.evaluate.answers
    rows = list(zip_longest(answers, story.verify.served_answers[: len(answers)], fillvalue=""))[:NUM_ANSWERS]
    if not rows:
        return ""
    marked = story.evaluate.exact_match_tuned is not None
    names = [name for name in ("base", "tuned") if any(getattr(answer, name) for answer, _ in rows if isinstance(answer, Answer))]
    names += ["served"] if any(served for _, served in rows) else []
    head = "<th class=prompt>Prompt</th>" + "".join(f"<th>{name.capitalize()}</th>" for name in ("expected", *names))
    body = "".join(_row(answer, str(served), names, marked) for answer, served in rows if isinstance(answer, Answer))
    note = f"The first {len(rows)} held-out records" + (
        ", as they came." if marked else "; a free text is not right or wrong, so nothing is marked."
    )
    return _card("long", "Answers side by side", note, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _row(answer: Answer, served: str, names: Sequence[str], marked: bool) -> str:
    said = {"base": answer.base, "tuned": answer.tuned, "served": served}
    cells = [_cell("Prompt", "prompt", answer.prompt), _cell("Expected", "answer", answer.expected)]
    for name in names:
        verdict = ("right" if exact_match(answer.expected, said[name]) else "wrong") if marked else ""
        cells.append(_cell(name.capitalize(), f"answer {verdict}".strip(), said[name]))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(label: str, classes: str, text: str) -> str:
    shown = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …"
    inner = escape(shown) if shown.strip() else '<span class="none">nothing</span>'
    whole = f' title="{escape(shown)}"' if len(shown) > LONG_CHARS else ""
    return f'<td class="{classes}" data-label="{label}"{whole}><span>{inner}</span></td>'


# Cost, use and origin


def _times(story: Story) -> str:
    longest = max(story.wall_s.values()) or 1.0
    bars = _bars(("tuned", stage, seconds / longest, duration(seconds)) for stage, seconds in story.wall_s.items())
    note = f"{duration(sum(story.wall_s.values()))} in all; trained on {_place(story.train)}."
    return _card("half", "Time", note, bars)


def _memory(story: Story) -> str:
    train, export, prepare = story.train, story.export, story.prepare
    where = "on the card" if train.device == "cuda" else "resident"
    facts = {
        f"Training, peak {where}": _size(train.peak_bytes),
        "Export, peak resident": _size(export.peak_rss_bytes),
        "GGUF": _size(export.gguf_bytes),
        "Training speed": f"{train.tokens_per_s:,.0f} tokens/s",
        "Tokens seen": f"{train.num_tokens:,} in {train.steps:,} steps",
        "Records": f"{prepare.num_train:,} trained, {prepare.num_valid:,} held out",
        "Left out": f"{prepare.num_left_out:,} too long, {prepare.num_duplicates:,} duplicates",
        "Shortened": f"{prepare.num_shortened:,} records",
    }
    return _card("half", "Memory and data", "", _definitions(facts, "facts two"))


def _serving(story: Story) -> str:
    body = '{"message": "..."}'
    here = f"make serve\ncurl -s localhost:8080/chat -H 'Content-Type: application/json' \\\n  -d '{body}'"
    name = story.manifest.name
    ollama = f"ollama create {name} -f output/gguf/{story.release.release}/Modelfile\nollama run {name}"
    parts = f"<div><h3>With the embedded engine</h3><pre>{escape(here)}</pre><h3>With Ollama</h3><pre>{escape(ollama)}</pre></div>"
    return _card("half", "Serve it", "output/gguf/current is this release until the next one.", parts)


def _origin(story: Story) -> str:
    train, export, base = story.train, story.export, story.manifest.base
    scale = Adapter(rank=train.rank, alpha=train.alpha, rslora=train.rslora).scale
    kind = " + ".join(("DoRA" if train.dora else "LoRA", *(("rsLoRA",) if train.rslora else ())))
    facts = {
        "Base model": base.name,
        "Revision": base.revision or "not pinned",
        "Adapter": f"{kind}, rank {train.rank}, alpha {train.alpha:g}, scale {scale:.4g}",
        "Context of training": f"{train.max_tokens:,} tokens{', packed' if train.packed else ''}",
        "Trained with": f"{train.backend} on {_place(train)}, {_passes(train.accumulation)}",
        "Given up for memory": "; then ".join(train.rungs) or "nothing",
        "Exported": f"{export.quantization}, adapter of step {export.checkpoint_step:,}",
        "Tensors": ", ".join(f"{num:,} {kind}" for kind, num in sorted(export.types.items())),
    }
    return _card("half", "Where it comes from", "", _definitions(facts, "facts two"))


def _place(train: TrainFacts) -> str:
    return "a CUDA card" if train.device == "cuda" else "a CPU"


def _passes(accumulation: int) -> str:
    return "one forward pass a step" if accumulation == 1 else f"{accumulation:,} forward passes a step"


def _definitions(facts: Mapping[str, str], classes: str) -> str:
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    return f'<dl class="{classes}">{pairs}</dl>'


def _foot(story: Story) -> str:
    m = story.manifest
    hashes = f"GGUF {story.export.gguf} sha256 {story.export.gguf_sha256}; manifest sha256 {story.release.manifest_sha256}"
    licences = "; ".join(f"{licence.applies_to}: {licence.name}, {licence.url}" for licence in m.licences)
    lines = (f"Trinity {m.trainer_version}. Base weights as NF4, sha256 {m.base.weights_sha256}", hashes, f"Licences: {licences}")
    return f"<footer>{''.join(f'<p>{escape(line)}</p>' for line in lines)}</footer>"


def _card(classes: str, title: str, note: str, inner: str) -> str:
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="{classes}"><h2>{escape(title)}</h2>{words}{inner}</section>'


# Numbers as words


def _percent(share: float) -> str:
    """One decimal; only a true whole is 100 and only a true nothing 0."""
    shown = f"{100 * share:.1f}".removesuffix(".0")
    if shown in ("100", "0") and share not in (0.0, 1.0):
        shown = f"{100 * share:.3g}" if shown == "0" else "99.9"
    return f"{shown} %"


def _nats(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _share(share: float) -> str:
    """CSS length of a share of the whole; what lies outside is moved to the edge."""
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"
