"""Known vulnerabilities of everything in requirements/*.txt, by pip-audit with OSV's data. Part of `make check`.

Exit code 1 where one is known, 0 where none is, and 0 with a line that says so where the data cannot be had. An index that answers but
knows nothing would read as "none": so a package with known holes is asked about first.

pip-audit runs in .tools/audit, made from its own hashed lock: what it brings must not meet what is audited.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".tools" / "audit"
KNOWN_BAD = "jinja2==2.10"
"""CVE-2019-10906 and more since."""
OSV = "https://api.osv.dev/v1/query"
ACCEPTED: Mapping[str, str] = {}
"""Identifiers that do not stop the check, with the reason why not."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv-url", default=OSV)
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where pip-audit is installed")
    parser.add_argument("locks", type=Path, nargs="*", help="instead of requirements/*.txt")
    options = parser.parse_args(arguments)
    why_not = install(options.environment)
    found = why_not or audit(options.environment, options.osv_url, options.locks or sorted(HERE.glob("*.txt")))
    if isinstance(found, str):
        print(f"audit: NOT audited: {found}")
        return 0
    return tell(found)


def audit(environment: Path, url: str, locks: Sequence[Path]) -> list[dict[str, Any]] | str:
    """pip-audit's findings, or why there are none to be had."""
    sentinel = environment / "known_bad.txt"
    sentinel.write_text(f"{KNOWN_BAD}\n", encoding="utf-8")
    known = ask(environment, url, [sentinel])
    if isinstance(known, str):
        return known
    if not any(one.get("vulns") for one in known):
        return f"{url} answers, and knows nothing of {KNOWN_BAD}"
    return ask(environment, url, locks)


def tell(found: Sequence[Mapping[str, Any]]) -> int:
    """Print what was found."""
    holes = [(one, hole) for one in found for hole in one.get("vulns", ())]
    for one, hole in holes:
        fixed = ", ".join(hole.get("fix_versions", ())) or "no version yet"
        accepted = f"; accepted: {ACCEPTED[hole['id']]}" if hole["id"] in ACCEPTED else ""
        print(f"audit: {one['name']} {one['version']}: {hole['id']}, fixed in {fixed}{accepted}")
    skipped = [f"{one['name']} ({one['skip_reason']})" for one in found if "skip_reason" in one]
    if skipped:
        print(f"audit: not audited: {'; '.join(skipped)}")
    open_holes = [hole for _, hole in holes if hole["id"] not in ACCEPTED]
    print(f"audit: {len(found) - len(skipped)} packages, {len(open_holes) or 'no'} known vulnerabilities")
    return 1 if open_holes else 0


def ask(environment: Path, url: str, locks: Sequence[Path]) -> list[dict[str, Any]] | str:
    """pip-audit's findings, a package each, or the reason why there are none."""
    command = [str(environment / "bin" / "pip-audit"), "--vulnerability-service", "osv", "--osv-url", url, "--format", "json"]
    command += ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--timeout", "10"]
    command += [part for lock in locks for part in ("--requirement", str(lock))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return f"{url} did not answer in time"
    except ValueError:
        if "ConnectionError" in done.stderr or "Timeout" in done.stderr:
            return f"{url} cannot be reached"
        return f"{url}: {(done.stderr.strip() or f'pip-audit ended with {done.returncode}').splitlines()[-1][:200]}"
    return found


def install(environment: Path) -> str | None:
    """pip-audit from its lock, unless that is there; returns why it could not be had."""
    lock, ready = HERE / "audit.txt", environment / "lock.txt"
    if ready.is_file() and ready.read_bytes() == lock.read_bytes():
        return None
    uv = os.environ.get("UV", "uv")
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)],
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            str(environment / "bin" / "python"),
            "--no-deps",
            "--require-hashes",
            "-r",
            str(lock),
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"pip-audit cannot be installed: {(done.stderr.strip() or 'uv failed').splitlines()[-1][:200]}"
    ready.write_bytes(lock.read_bytes())
    return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
