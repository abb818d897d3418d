"""Every command that a document shows is run by something, which is there."""

from __future__ import annotations

import re

import pytest

from tests.docs_commands import ELSEWHERE, HERE, PAGES, ROOT, commands, every_command, place


def nobody_runs(found: list[str]) -> list[str]:
    return [command for command in found if place(command) is None]


def is_there(proof: str) -> bool:
    """`FILE::TEST`, `FILE: LINE`, or a log that is committed."""
    file, _, test = proof.partition("::")
    if test:
        return bool(re.search(rf"^(?:async )?def {test}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE))
    file, _, line = proof.partition(": ")
    path = ROOT / file
    return path.is_file() and (not line or line in [written.strip() for written in path.read_text(encoding="utf-8").splitlines()])


def test_every_command_of_the_documents_is_run() -> None:
    assert len(every_command()) > 40
    assert nobody_runs(every_command()) == []


def test_no_entry_is_for_a_command_that_no_document_shows() -> None:
    used = {place(command) for command in every_command()}
    assert [key for key in [*HERE, *ELSEWHERE] if key not in used] == []


@pytest.mark.parametrize("key", ELSEWHERE)
def test_what_runs_it_elsewhere_is_there(key: str) -> None:
    assert [proof for proof in ELSEWHERE[key] if not is_there(proof)] == []


def test_make_targets_in_running_text_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = [
        name for page in PAGES for name in re.findall(r"`(?:\w+=\w+ )?make (?:-s )?([a-z0-9-]+)[^`]*`", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 30
    assert [name for name in named if name not in targets] == []


def test_what_nobody_runs_is_seen_in_every_kind_of_block() -> None:
    text = "```sh\nmake upgrade    # anew\nmake plan\n```\n\n    python -m nothing at all\n\n```python\nimport this\n```\n"
    assert nobody_runs(commands(text)) == ["make upgrade", "python -m nothing at all", "import this\n"]
    assert (
        not is_there("tests/test_docs.py::test_nothing") and not is_there(".ci/run: timed make coffee") and not is_there("docs/logs/no.log")
    )
