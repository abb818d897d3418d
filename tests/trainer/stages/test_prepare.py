"""prepare with the tiny model's tokenizer, from a user's file to records on disk; and the sample data through it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest

from trainer import config, tokenizer
from trainer.backends import datasets
from trainer.config import Config
from trainer.dataset import formats, records, template
from trainer.errors import DataError
from trainer.facts import Facts, PrepareFacts
from trainer.stages import prepare

ROOT = Path(__file__).parents[3]
F = TypeVar("F", bound=Facts)


class NoInputs:
    def path(self, stage: str) -> Path:
        raise AssertionError(stage)

    def facts(self, kind: type[F]) -> F:
        raise AssertionError(kind)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(data: Path, cache: Path, *overrides: str, preset: str = "tiny") -> Config:
    return config.load(preset, [f"data.path={data}", f"paths.cache={cache}", "model.name=random:tiny", *overrides])


def run(cfg: Config, out: Path) -> PrepareFacts:
    out.mkdir()
    return prepare.run(cfg, NoInputs(), out)


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path: Path, *conversations: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations), encoding="utf-8")
    return path


def notes(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]


def everything(out: Path) -> list[records.Record]:
    return [record for name in ("train.jsonl", "valid.jsonl") for record in records.read(out / name)]


def test_records_hold_the_rendered_conversation_and_its_supervised_spans(cache: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", *(turn(f"what is {number}?", f"it is {number} ") for number in range(40)))
    facts, out = run(settings(data, cache), tmp_path / "out"), tmp_path / "out"
    assert facts.num_train + facts.num_valid == 40 and facts.source_format == "messages"
    gemma = tokenizer.load(out / "tokenizer.json")
    found = everything(out)
    assert sorted(record.line for record in found) == list(range(1, 41))
    for record in found:
        assert record.answer == f"it is {record.line - 1}"
        assert record.id == records.prompt_id(record.messages)
        assert (record.ids, record.spans) == template.encode(gemma, record.messages)
    train = list(records.read(out / "train.jsonl"))
    assert facts.num_train_tokens == sum(len(record.ids) for record in train)
    assert facts.num_supervised_tokens == sum(end - start for record in train for start, end in record.spans)
    assert facts.longest_tokens == max(len(record.ids) for record in found)
    assert facts.num_rows_packed < facts.num_train and 0.5 < facts.pack_fill <= 1


def test_the_same_file_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", *(turn(f"q{number}", "a") for number in range(30)))
    first, second = (run(settings(data, cache), tmp_path / name) for name in ("one", "two"))
    assert first == second
    for name in ("train.jsonl", "valid.jsonl", "dropped.jsonl", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_records_that_do_not_fit_lose_their_oldest_turns_or_are_left_out(cache: Path, tmp_path: Path) -> None:
    long = [
        {"role": "system", "content": "be brief"},
        *(message for number in range(12) for message in turn(f"question {number}", f"answer {number}")),
    ]
    data = write(tmp_path / "data.jsonl", turn("q", "a"), long, turn("x" * 300, "y"), turn("another", "b"))
    facts = run(settings(data, cache, "data.max_tokens=128"), tmp_path / "out")
    assert (facts.num_shortened, facts.num_left_out, facts.num_duplicates) == (1, 1, 0)
    assert facts.num_train + facts.num_valid == 3 and facts.longest_tokens <= 128
    shortened = next(record for record in everything(tmp_path / "out") if record.line == 2)
    assert shortened.messages[0] == {"role": "system", "content": "be brief"}
    assert shortened.messages[-1]["content"] == "answer 11" and shortened.messages[1]["role"] == "user"
    assert (
        tokenizer.load(tmp_path / "out" / "tokenizer.json")
        .decode(shortened.ids, skip_special_tokens=False)
        .startswith("<bos><start_of_turn>user\nbe brief\n\nquestion")
    )
    assert [(note["line"], note["why"], note["kept"]) for note in notes(tmp_path / "out")] == [
        (2, "shortened", True),
        (3, "too long", False),
    ]


def test_duplicates_and_unanswered_ends_are_noted(cache: Path, tmp_path: Path) -> None:
    ended = [*turn("q", "a"), {"role": "user", "content": "and?"}]
    data = write(tmp_path / "data.jsonl", turn("q", "a"), turn(" q ", "a\n"), ended, turn("q", "another answer"), turn("r", "a"))
    facts = run(settings(data, cache), tmp_path / "out")
    assert facts.num_duplicates == 2 and facts.num_train + facts.num_valid == 3
    assert [(note["line"], note["why"]) for note in notes(tmp_path / "out")] == [
        (2, "duplicate"),
        (3, "unanswered last turn"),
        (3, "duplicate"),
    ]


def test_one_prompt_with_many_answers_stays_on_one_side(cache: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", *(turn(f"q{number % 7}", f"a{number}") for number in range(70)))
    run(settings(data, cache, "data.valid_fraction=0.5"), tmp_path / "out")
    sides = [{record.id for record in records.read(tmp_path / "out" / name)} for name in ("train.jsonl", "valid.jsonl")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("fraction", ["0.000001", "0.999999"])
def test_two_prompts_are_enough_for_both_sides(fraction: str, cache: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", turn("q", "a"), turn("q", "b"), turn("r", "a"))
    facts = run(settings(data, cache, f"data.valid_fraction={fraction}"), tmp_path / "out")
    assert facts.num_train and facts.num_valid and facts.num_train + facts.num_valid == 3
    train = list(records.read(tmp_path / "out" / "train.jsonl"))
    assert facts.num_train_tokens == sum(len(record.ids) for record in train)


def test_one_prompt_alone_is_one_clear_error(cache: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", turn("q", "a"), turn("q", "b"))
    with pytest.raises(DataError, match="2 usable records, 1 different prompts, but at least two are needed"):
        run(settings(data, cache), tmp_path / "out")


def test_a_missing_file_says_what_to_do(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; put your conversations there.*DATA=FILE.*data/README.md"):
        run(settings(tmp_path / "absent.json", cache), tmp_path / "out")


def test_what_is_wrong_with_the_file_is_said_before_anything_is_written(cache: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [}\n{"messages": []}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        run(settings(data, cache), tmp_path / "out")
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [f"{data}:1", f"{data}:2"]
    assert not list((tmp_path / "out").iterdir())


def test_an_answer_that_looks_like_a_date_stays_text(cache: Path, tmp_path: Path) -> None:
    """Sentinel for the wall: read by datasets alone, a column of dates comes back as timestamps."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"day {number}", "completion": f"2026-11-{number + 1:02}T00:00:00Z"} for number in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(settings(data, cache), tmp_path / "out")
    assert {record.line: record.answer for record in everything(tmp_path / "out")} == {
        number + 1: row["completion"] for number, row in enumerate(rows)
    }
    import datasets as library

    theirs = library.load_dataset("json", data_files=str(data), split="train", cache_dir=str(tmp_path / "theirs"))
    assert theirs[0]["completion"] != rows[0]["completion"]


def test_conversations_wait_on_disk_in_order_and_leave_nothing_behind(tmp_path: Path) -> None:
    def made() -> Iterator[tuple[int, list[dict[str, str]]]]:
        for number in range(2500):
            yield number, turn(f"q{number}", "")

    cache = tmp_path / "cache"
    with datasets.spooled(made(), cache) as spool:
        assert len(spool) == 2500 and any(cache.iterdir())
        for _ in range(2):
            batches = list(spool.batches(1000))
            assert [len(batch) for batch in batches] == [1000, 1000, 500]
            assert [row for batch in batches for row in batch] == list(made())
    assert not any(cache.iterdir())


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "data" / "make_sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sample_is_what_its_generator_makes(generator: ModuleType) -> None:
    assert (ROOT / "data" / "sample.jsonl").read_text(encoding="ascii").splitlines() == list(generator.lines())


def test_the_sample_measures_learning_and_not_memory(cache: Path, tmp_path: Path) -> None:
    """Through the demo's own split: enough held-out records, no held-out prompt in training, few answers that were seen."""
    facts = run(settings(ROOT / "data" / "sample.jsonl", cache, preset="gemma3-270m-cpu"), tmp_path / "out")
    assert facts.num_train + facts.num_valid >= 1200 and facts.num_valid >= 120
    assert facts.num_duplicates == facts.num_shortened == facts.num_left_out == 0
    train, valid = (list(records.read(tmp_path / "out" / name)) for name in ("train.jsonl", "valid.jsonl"))
    assert not {record.messages[0]["content"].casefold().strip(".") for record in train} & {
        record.messages[0]["content"].casefold().strip(".") for record in valid
    }
    known = {record.answer for record in train}
    assert sum(record.answer not in known for record in valid) > len(valid) / 2


def test_every_answer_of_the_sample_is_the_right_one(generator: ModuleType) -> None:
    """Read back from the English by a second, independent reading: what is named stands in its field, what is not is a star."""
    for line, messages in formats.Reader(ROOT / "data" / "sample.jsonl"):
        text, cron = messages[0]["content"], messages[1]["content"]
        assert cron == second_reading(text, generator.WEEKDAYS, generator.MONTHS), f"line {line}: {text}"


def second_reading(text: str, weekdays: tuple[str, ...], months: tuple[str, ...]) -> str:
    def first(*patterns: str) -> str:
        return next((found[1] for pattern in patterns if (found := re.search(pattern, text))), "")

    def named(names: tuple[str, ...], start: int) -> str:
        return next((str(number) for number, name in enumerate(names, start) if name in text), "")

    any_month = "|".join(months)
    step, every = first(r"(\d+) minutes"), first(r"(\d+) hours")
    minute = f"*/{step}" if step else str(int(first(r":(\d\d)", r"at minute (\d+)")))
    hour = f"*/{every}" if every else str(int(first(r"(\d\d):") or -1)).replace("-1", "*")
    day = first(r"day (\d+)", rf"(?:{any_month}) (\d+)\b(?!:)", rf"(\d+) (?:{any_month})") or "*"
    weekday = "1-5" if "weekday" in text else "0,6" if "weekend" in text else named(weekdays, 0) or "*"
    return f"{minute} {hour} {day} {named(months, 1) or '*'} {weekday}"


def test_the_tokenizer_of_a_model_directory_is_a_source_so_that_another_one_prepares_anew(tmp_path: Path) -> None:
    cfg = config.load("tiny", [f"model.name={tmp_path}"])
    assert prepare.sources(cfg) == {"data": cfg.data.path}
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert prepare.sources(cfg) == {"data": cfg.data.path, "tokenizer": tmp_path / "tokenizer.json"}
