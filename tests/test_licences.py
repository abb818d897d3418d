"""docs/licences.md speaks of what is locked, and its list of what stands in docs/agpl_files.txt."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
FILES = (ROOT / "docs" / "agpl_files.txt").read_text(encoding="utf-8").splitlines()
HEAD, LISTED = " ".join(FILES[:2]), [line[2:] for line in FILES if not line.startswith("#")]


def locked(name: str) -> str:
    lock = (ROOT / "requirements" / "trainer.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{name}==(\S+)", lock, flags=re.MULTILINE)
    return str(version)


def test_the_list_is_of_the_locked_versions() -> None:
    for name, lock in (("unsloth", "unsloth"), ("unsloth_zoo", "unsloth-zoo")):
        assert f"{name} {locked(lock)}" in TEXT, "make the list anew, as the page says"
        assert f"{name} {locked(lock)}" in HEAD


def test_the_counts_are_those_of_the_list() -> None:
    assert f"{sum(name.startswith('unsloth_zoo/') for name in LISTED)} of its files say AGPL" in TEXT
    assert f"{sum(name.startswith('unsloth/') for name in LISTED)} of its files, and its `unsloth_cli` and `studio`" in TEXT
    assert f"loads {sum(line.startswith('+') for line in FILES)}." in TEXT


def test_the_server_has_nothing_of_unsloth() -> None:
    assert "unsloth" not in (ROOT / "requirements" / "server.txt").read_text(encoding="utf-8")
