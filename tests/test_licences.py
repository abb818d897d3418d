"""docs/licences.md speaks of what is locked, and its list of what stands in docs/agpl_files.txt."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
FILES = (ROOT / "docs" / "agpl_files.txt").read_text(encoding="utf-8").splitlines()
HEAD, LISTED = " ".join(FILES[:2]), [line[2:] for line in FILES if not line.startswith("#")]


PERMISSIVE = re.compile(r"MIT|BSD|Apache|Python Software Foundation|PSF|ISC|BSL-1\.0|Zlib|CC0|CNRI|Unlicense")
ASKS_MORE = re.compile(r"GPL|MPL|Mozilla|Proprietary|LicenseRef|EUPL|EPL|CDDL", flags=re.IGNORECASE)
SAID_IN_A_FILE_ONLY = {
    "axe-playwright-python": "MIT",
    "cuda-toolkit": "a package of nothing but dependencies",
    "hf-transfer": "Apache 2.0",
    "torchao": "BSD",
}


def claims(package: Distribution) -> str:
    """Licence as the package's metadata has it: expression, classifiers, the older field's first line."""
    fields = package.metadata
    classified = [line for line in fields.get_all("Classifier", []) if line.startswith("License ::")]
    return "; ".join(
        [*fields.get_all("License-Expression", []), *classified, *(line.partition("\n")[0] for line in fields.get_all("License", []))]
    )


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


def test_what_is_installed_is_permissive_or_stands_on_the_page() -> None:
    """Of this environment's packages, whatever lock they came from; what names no licence counts as not permissive."""
    pins = {
        pin for lock in (ROOT / "requirements").glob("*.txt") for pin in re.findall(r"^([a-z0-9._-]+)==", lock.read_text(), re.MULTILINE)
    }
    named = {canonical(word) for word in re.findall(r"[a-z0-9_.-]+", TEXT.lower())}
    asked = {canonical(package.metadata["Name"]): claims(package) for package in distributions()}
    asked = {name: claim for name, claim in asked.items() if name in pins and name not in SAID_IN_A_FILE_ONLY}
    assert len(asked) > 50
    others = {name: claim for name, claim in asked.items() if ASKS_MORE.search(claim) or not PERMISSIVE.search(claim)}
    lacking = {name: claim for name, claim in others.items() if name.partition("-part")[0] not in named}
    assert not lacking, "rows for docs/licences.md"
    assert {"certifi", "tqdm"} <= set(others)


def test_every_library_of_nvidias_stands_on_the_page() -> None:
    """From the lock: torch's CPU build has none of them installed."""
    pins = re.findall(r"^(nvidia-[a-z0-9-]+)==", (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    row = next(line for line in TEXT.splitlines() if line.startswith("| nvidia-"))
    assert sorted(pins) == sorted(re.findall(r"nvidia-[a-z0-9-]+", row.split("|")[1]))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
