from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trainer.artifacts import Label, Record
from trainer.config import Config, Sampling
from trainer.facts import Answer, EvaluateFacts, ExportFacts, Facts, LossPoint, PrepareFacts, Refusal, ReleaseFacts, TrainFacts, VerifyFacts
from trainer.manifest import AsTrained, Base, File, Licence, Manifest, Parity, Prompt, Scores
from trainer.stages import report
from trainer.stages.report import Story
from trainer.worker import Job

HOSTILE = "</td><script>alert(1)</script><img src=\"https://example.org/x.png\" onerror='x()'>&amp;$body"


PROMPTS = (
    ("Run every weekday at half past six in the morning", "30 6 * * 1-5", "30 6 * * 1-5"),
    ("Run at noon on the first day of every month", "0 12 1 * *", "0 12 1 * *"),
    ("Run every 15 minutes between 9 and 17 o'clock", "*/15 9-17 * * *", "*/15 9-17 * * *"),
    ("Run on Sundays at 23:05", "5 23 * * 0", "5 23 * * 0"),
    ("Run every two hours, ten minutes past", "10 */2 * * *", "10 2 * * *"),
    ("Run at midnight on the 15th of March", "0 0 15 3 *", "0 0 15 3 *"),
    ("Run every five minutes in January", "*/5 * * 1 *", "*/5 * * 1 *"),
    ("Run on Tuesdays and Thursdays at a quarter to eight in the evening", "45 19 * * 2,4", "45 19 * * 2,4"),
)


@pytest.fixture
def story() -> Story:
    """A run like the demo's, every figure another one."""
    answers = tuple(
        Answer(
            prompt=prompt,
            expected=expected,
            base=f"Sure! You can run it with a scheduler:\n\n{prompt.lower()}, then {prompt.lower()}",
            tuned=tuned,
        )
        for prompt, expected, tuned in (*PROMPTS, *PROMPTS)
    )
    return Story(
        prepare=PrepareFacts(
            source_format="messages",
            num_train=1083,
            num_valid=121,
            num_train_tokens=41_007,
            num_supervised_tokens=13_579,
            num_valid_tokens=4_601,
            longest_tokens=77,
            num_shortened=3,
            num_left_out=2,
            num_duplicates=17,
            num_rows_packed=82,
            pack_fill=0.977,
        ),
        train=TrainFacts(
            backend="transformers",
            device="cpu",
            rank=64,
            alpha=16.0,
            dora=True,
            rslora=True,
            max_tokens=512,
            packed=False,
            steps=100,
            accumulation=1,
            num_tokens=49_920,
            wall_s=186.4,
            tokens_per_s=267.8,
            peak_bytes=4_410_000_000,
            train_loss=tuple(
                LossPoint(step=step, loss=6.2 * math.exp(-step / 14) + 0.016 + 0.02 * (step % 7 == 0)) for step in range(1, 101)
            ),
            valid_loss=tuple(LossPoint(step=step, loss=6.0 * math.exp(-step / 13) + 0.0417) for step in (0, 25, 50, 75, 100)),
            best_step=75,
        ),
        evaluate=EvaluateFacts(
            num_records=120,
            loss_base=6.1234,
            loss_tuned=0.0417,
            exact_match_base=0.0,
            exact_match_tuned=0.9416,
            num_reference=32,
            num_held_out=121,
            answers=answers,
            wall_s=71.9,
        ),
        export=ExportFacts(
            quantization="q4_k_m",
            gguf="trinity-q4_k_m.gguf",
            gguf_bytes=252_904_192,
            gguf_sha256="5f" * 32,
            num_tensors=236,
            types={"Q4_K": 84, "Q6_K": 43, "F32": 109},
            checkpoint_step=75,
            wall_s=23.8,
            peak_rss_bytes=1_740_000_000,
        ),
        verify=VerifyFacts(
            num_prompts=118,
            ids_equal=1.0,
            num_positions=431,
            kl_nats=0.0213,
            top1_agreement=0.9745,
            max_kl_nats=0.15,
            min_top1=0.85,
            ends=0.9916,
            num_answers=119,
            exact_match_served=0.9333,
            served_answers=tuple(answer.tuned for answer in answers),
            verified=True,
            wall_s=64.2,
        ),
        release=ReleaseFacts(
            release="gemma3-270m-cpu-1a2b3c4d5e6f", directory=Path("output/gguf/gemma3-270m-cpu-1a2b3c4d5e6f"), manifest_sha256="c3" * 32
        ),
        manifest=manifest(),
        wall_s={"prepare": 12.4, "train": 197.3, "evaluate": 72.6, "export": 24.9, "verify": 65.1, "release": 0.8},
    )


def manifest() -> Manifest:
    file = File(path="trinity-q4_k_m.gguf", num_bytes=252_904_192, sha256="5f" * 32)
    return Manifest(
        schema_version=1,
        name="trinity",
        release="gemma3-270m-cpu-1a2b3c4d5e6f",
        created=datetime(2026, 11, 25, 9, 41, tzinfo=UTC),
        trainer_version="0.1.0",
        base=Base(name="embedded:gemma-3-270m", revision="", weights_sha256="9e" * 32),
        adapter=AsTrained(key="ab" * 32, rank=64, alpha=16.0, dora=True, rslora=True, max_tokens=512, rungs=()),
        quantization="q4_k_m",
        files={"gguf": file, "modelfile": file, "probes": file},
        prompt=Prompt(
            template="{{ .Prompt }}", stop=("<end_of_turn>",), num_ctx=2048, sampling=Sampling(), rewrite=(), strip=("user", "assistant")
        ),
        scores=Scores(
            num_records=120, loss_base=6.1, loss_tuned=0.04, exact_match_base=0.0, exact_match_tuned=0.94, exact_match_served=0.93
        ),
        parity=Parity(
            verified=True,
            num_prompts=118,
            ids_equal=1.0,
            num_positions=431,
            kl_nats=0.02,
            top1_agreement=0.97,
            max_kl_nats=0.15,
            min_top1=0.85,
            waived=(),
        ),
        licences=(
            Licence(
                applies_to="base",
                name="Gemma Terms of Use",
                notice="Gemma is provided under and subject to the Gemma Terms of Use",
                url="https://ai.google.dev/gemma/terms",
            ),
        ),
    )


class Page(HTMLParser):
    """Visible text and every element's name and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def unscored(story: Story) -> Story:
    """The same run without generated answers."""
    answers = tuple(answer.model_copy(update={"base": "", "tuned": ""}) for answer in story.evaluate.answers)
    evaluate = story.evaluate.model_copy(update={"exact_match_base": None, "exact_match_tuned": None, "answers": answers})
    return story._replace(evaluate=evaluate, verify=story.verify.model_copy(update={"exact_match_served": None}))


def test_every_figure_shown_is_the_facts(story: Story) -> None:
    text = Page(report.page(story)).text
    for figure in (
        "0 %", "94.2 %", "93.3 %", "120 of 121 held-out records", "119 greedy answers", "118 prompts", "431 positions", "0.021 nats", "at most 0.150",
        "97.5 %", "at least 85 %", "99.2 %", "6.123", "0.042", "step 75", "4.41 GB", "1.74 GB", "252.9 MB", "268 tokens/s", "49,920 in 100 steps",
        "1,083 trained, 121 held out", "2 too long, 17 duplicates", "3 records", "rank 64, alpha 16, scale 2", "512 tokens", "3 min 17 s", "6 min 13 s in all",
        "84 Q4_K", "43 Q6_K", "109 F32", "gemma3-270m-cpu-1a2b3c4d5e6f", "embedded:gemma-3-270m", "5f" * 32, "c3" * 32, "9e" * 32, "Gemma Terms of Use",
    ):  # fmt: skip
        assert figure in text, figure


def test_a_changed_fact_changes_the_page(story: Story) -> None:
    """The sentinel of the test above: the figures come from the facts, not from the template."""
    verify = story.verify.model_copy(update={"exact_match_served": 0.8123, "kl_nats": 0.0456})
    text = Page(report.page(story._replace(verify=verify))).text
    assert "81.2 %" in text
    assert "0.046 nats" in text
    assert "93.3 %" not in text


def test_hostile_text_is_shown_as_text(story: Story) -> None:
    answer = Answer(prompt=HOSTILE, expected=HOSTILE, base=HOSTILE, tuned=HOSTILE)
    evaluate = story.evaluate.model_copy(update={"answers": (answer,)})
    verify = story.verify.model_copy(update={"served_answers": (HOSTILE,), "waived": (Refusal(link="kl", message=HOSTILE),)})
    manifest = story.manifest.model_copy(update={"name": HOSTILE, "base": story.manifest.base.model_copy(update={"name": HOSTILE})})
    hostile = story._replace(evaluate=evaluate, verify=verify, manifest=manifest)
    page = Page(report.page(hostile))
    assert page.text.count(HOSTILE) == 5 + 1 + 1 + 2  # answers, waived check, base model, two commands
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img"})
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_nothing_is_requested_and_nothing_runs(story: Story) -> None:
    html = report.page(story)
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base"})
    assert not {"src", "href", "srcset", "data", "action"} & {name for _, attributes in page.elements for name in attributes}
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_the_elements_are_closed_in_order(story: Story) -> None:
    class Nesting(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    nesting = Nesting()
    nesting.feed(report.page(story))
    assert nesting.open == []


def test_without_exact_match_the_loss_tells_the_story(story: Story) -> None:
    page = Page(report.page(unscored(story)))
    assert "from 6.123 to 0.042 nats" in page.text
    assert "Exact answers" not in page.text
    assert not [
        attributes for tag, attributes in page.elements if tag == "td" and {"right", "wrong"} & set((attributes["class"] or "").split())
    ]
    assert [word for word in page.words if word in ("Base", "Tuned", "Served")] == ["Served"]


def test_answers_are_marked_right_or_wrong_as_exact_match_counts_them(story: Story) -> None:
    answers = (
        Answer(prompt="p", expected="0 1 * * *", base="no", tuned=" 0 1 * * *\n"),
        Answer(prompt="q", expected="x", base="x", tuned=""),
    )
    evaluate = story.evaluate.model_copy(update={"answers": answers})
    verify = story.verify.model_copy(update={"served_answers": ("0 1 * * *",)})
    page = Page(report.page(story._replace(evaluate=evaluate, verify=verify)))
    classes = [
        (a["data-label"], (a["class"] or "").removeprefix("answer "))
        for tag, a in page.elements
        if tag == "td" and a["data-label"] not in ("Prompt", "Expected")
    ]
    assert classes == [
        ("Base", "wrong"),
        ("Tuned", "right"),
        ("Served", "right"),
        ("Base", "right"),
        ("Tuned", "wrong"),
        ("Served", "wrong"),
    ]


def test_a_waived_check_is_no_verified_model(story: Story) -> None:
    verify = story.verify.model_copy(
        update={"verified": False, "kl_nats": 0.31, "waived": (Refusal(link="kl", message="mean KL 0.31 nats, limit 0.15"),)}
    )
    html = report.page(story._replace(verify=verify))
    assert "Not verified" in Page(html).text
    assert "mean KL 0.31 nats, limit 0.15" in Page(html).text
    assert 'class="check over"' in html
    assert 'class="check over"' not in report.page(story)


@pytest.mark.parametrize("losses", [(), (0.0,), (1.5,), (float("nan"), 2.0), (300.0, 1e-4), (0.0, 5.0)])
def test_any_losses_can_be_drawn(story: Story, losses: tuple[float, ...]) -> None:
    points = tuple(LossPoint(step=step, loss=loss) for step, loss in enumerate(losses))
    html = report.page(story._replace(train=story.train.model_copy(update={"train_loss": points, "valid_loss": points})))
    assert "nan" not in html.lower()
    assert "Loss" in Page(html).text


def test_the_curve_is_drawn_where_the_losses_are(story: Story) -> None:
    points = tuple(LossPoint(step=step, loss=loss) for step, loss in ((0, 2.0), (50, 1.0), (100, 0.5)))
    html = report.page(story._replace(train=story.train.model_copy(update={"train_loss": points, "valid_loss": ()})))
    assert 'points="0.0,0.0 500.0,500.0 1000.0,750.0"' in html


@pytest.mark.parametrize(
    ("share", "words"), [(0.0, "0 %"), (1.0, "100 %"), (0.9999, "99.9 %"), (0.0003, "0.03 %"), (0.5, "50 %"), (0.9416, "94.2 %")]
)
def test_only_a_whole_is_called_100_percent(share: float, words: str) -> None:
    assert report._percent(share) == words


def test_the_stage_reads_published_directories_and_writes_one_file(story: Story, tmp_path: Path) -> None:
    inputs = {}
    for stage in report.STAGES:
        directory = tmp_path / stage
        directory.mkdir()
        _publish(directory, stage, getattr(story, stage), story.wall_s[stage])
        inputs[stage] = directory
    (inputs["release"] / "manifest.json").write_text(story.manifest.model_dump_json())
    out = tmp_path / "report"
    out.mkdir()
    facts = report.run(Config(), Job(stage="report", config=Config(), inputs=inputs, out=out), out)
    assert [file.name for file in out.iterdir()] == ["report.html"]
    assert facts.html_bytes == (out / "report.html").stat().st_size
    assert (out / "report.html").read_text() == report.page(story)


def test_it_needs_no_torch() -> None:
    script = "import sys, trainer.stages.report; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def _publish(directory: Path, stage: str, facts: Facts, wall_s: float) -> None:
    label = Label(stage=stage, version=1, sections={}, sources={}, inputs={})
    record = Record(key=label.key, label=label, files={}, facts=json.loads(facts.model_dump_json()), wall_s=wall_s)
    (directory / "artifact.json").write_text(record.model_dump_json())
