from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.dataset import formats
from trainer.errors import DataError

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ASSISTANT]}


def lines(path: Path, *trees: Any) -> Path:
    path.write_text("".join((tree if isinstance(tree, str) else json.dumps(tree)) + "\n" for tree in trees), encoding="utf-8")
    return path


def read(path: Path, wanted: str = "auto") -> tuple[str, list[tuple[int, list[tuple[str, str]]]]]:
    reader = formats.Reader(path, wanted)
    found = [(line, [(message["role"], message["content"]) for message in messages]) for line, messages in reader]
    reader.check()
    return reader.format, found


def problems(path: Path, wanted: str = "auto") -> list[str]:
    with pytest.raises(DataError) as caught:
        read(path, wanted)
    assert all(problem.startswith((f"{path}:", "... and")) for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("tree", "name", "turns"),
    [
        (GOOD, "messages", [("user", "q"), ("assistant", "a")]),
        (
            {"messages": [{"role": "system", "content": "s"}, USER, {"role": "model", "content": "a"}]},
            "messages",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
            "messages",
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"instruction": "do", "output": "done"}, "alpaca", [("user", "do"), ("assistant", "done")]),
        (
            {"instruction": "do", "input": "this", "output": "done", "system": "s"},
            "alpaca",
            [("system", "s"), ("user", "do\n\nthis"), ("assistant", "done")],
        ),
        ({"instruction": "do", "input": "", "output": "done"}, "alpaca", [("user", "do"), ("assistant", "done")]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [("user", "q"), ("assistant", "a")]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", [("user", "q"), ("assistant", "a")]),
    ],
)
def test_each_format_is_recognised_by_its_keys(tree: dict[str, Any], name: str, turns: list[tuple[str, str]], tmp_path: Path) -> None:
    extra = {**tree, "source": "elsewhere", "score": 3}
    assert read(lines(tmp_path / "data.jsonl", extra)) == (name, [(1, turns)])
    assert read(lines(tmp_path / "data.jsonl", extra), name) == (name, [(1, turns)])


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"messages": [{"role": "tool", "content": "x"}, ASSISTANT]}, ['unknown role "tool" in turn 1', "user, assistant", "rename it"]),
        ({"messages": [USER]}, ["no assistant turn", '["user"]', "add an answer"]),
        ({"messages": []}, ["no assistant turn"]),
        ({"messages": [ASSISTANT]}, ["turn 1 is of assistant where user must speak"]),
        ({"messages": [USER, USER, ASSISTANT]}, ["turn 2 is of user where assistant must speak"]),
        ({"messages": [USER, {"role": "system", "content": "s"}, ASSISTANT]}, ["turn 2 is of system where assistant must speak"]),
        ({"messages": [{"role": "system", "content": "s"}, ASSISTANT]}, ["turn 2 is of assistant where user must speak"]),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, ["turn 2 (assistant) is empty"]),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ["content of turn 2 must be text, not null"]),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, ["must be text", "images"]),
        ({"messages": [USER, {"role": "assistant"}]}, ["turn 2 of 'messages' must be an object with 'role' and 'content'"]),
        ({"messages": "hello"}, ["'messages' must be a list of turns, not \"hello\""]),
        ({"conversations": [{"from": "bot", "value": "x"}]}, ['unknown role "bot"', "human, user, gpt"]),
        ({"instruction": "do", "output": 5}, ["output must be text, not 5"]),
        (
            {"question": "q", "answer": "a"},
            ["none of the known formats", '["question", "answer"]', "alpaca: instruction, output", "data/README.md"],
        ),
        ("7", ["a record must be a JSON object, not 7"]),
        ('{"messages": [{"role": "user", "content": "q\\ud800"}, {"role": "assistant", "content": "a"}]}', ["half a character"]),
    ],
)
def test_a_record_that_cannot_be_used_is_named_with_line_value_and_remedy(tree: Any, said: list[str], tmp_path: Path) -> None:
    found = problems(lines(tmp_path / "data.jsonl", tree))
    assert len(found) == 1 and found[0].startswith("1: ")
    assert all(part in found[0] for part in said), found[0]


def test_all_problems_are_listed_at_once_and_reading_goes_on_after_a_broken_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", GOOD, '{"messages": [', "", {"messages": [USER]}, GOOD, "not json")
    found = problems(path)
    assert [problem.partition(":")[0] for problem in found] == ["2", "4", "6"]
    assert "broken JSON" in found[0] and "each line must be one whole JSON object" in found[0]


def test_of_very_many_problems_twenty_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    found = problems(lines(tmp_path / "data.jsonl", *[{"messages": [USER]}] * 1234))
    assert len(found) == 21
    assert found[-1].startswith("... and 1214 more problems")


def test_one_record_in_another_format_is_named(tmp_path: Path) -> None:
    found = problems(lines(tmp_path / "data.jsonl", GOOD, {"prompt": "q", "completion": "a"}))
    assert len(found) == 1 and found[0].startswith("2: no 'messages' in it, as format messages needs")


def test_a_format_that_is_asked_for_is_not_guessed(tmp_path: Path) -> None:
    assert "which data.format asks for" in problems(lines(tmp_path / "data.jsonl", GOOD), "alpaca")[0]


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff\n", "[]", " [ ]\n"])
def test_an_empty_file_says_so(content: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(content, encoding="utf-8")
    assert problems(path)[0].startswith("1: the file has no records")


def test_a_list_gives_the_line_of_each_record(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("\ufeff" + json.dumps([GOOD, GOOD, {"messages": [USER]}], indent=1), encoding="utf-8")
    found = problems(path)
    assert len(found) == 1
    number = int(found[0].partition(":")[0])
    text = path.read_text(encoding="utf-8-sig").splitlines()
    assert text[number - 1] == " {" and sum(line == " {" for line in text[:number]) == 3
    path.write_text(json.dumps([GOOD, GOOD]), encoding="utf-8")
    assert [line for line, _ in read(path)[1]] == [1, 1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[\n{"messages": 1}\n{"messages": 2}]', 3),
        ('[\n{"messages": 1},\n{"messages": ', 3),
        ('[\n{"messages": 1},\n', 3),
        ('[\n{"messages": 1}', 2),
        ('[\n{"messages": 1}]\n{"more": 1}\n', 2),
        ('[\n,{"messages": 1}]', 2),
    ],
)
def test_a_broken_list_says_where(content: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(content, encoding="utf-8")
    broken = [problem for problem in problems(path) if "broken JSON" in problem]
    assert len(broken) == 1 and broken[0].startswith(f"{line}: "), broken


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "caf\xe9"}\n')
    assert problems(path) == ["2: byte 0xe9 is not UTF-8; save the file as UTF-8"]
    path.write_bytes(b'[\n\n{"messages": "caf\xe9"}]')
    assert problems(path)[0].startswith("3: byte 0xe9 is not UTF-8")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode())
    assert [line for line, _ in read(path)[1]] == [1, 2]
