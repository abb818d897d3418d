"""requirements/audit.py with the real pip-audit, against a server of ours that speaks OSV's protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.local_site import serving, url
from tests.server.real import absent

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "requirements" / "audit.py"
BAD = {"jinja2==2.10": "2.11"}
"""What every server but a hollow one knows: the sentinel's package, and where it was mended."""


@contextmanager
def osv(known: dict[str, str]) -> Iterator[str]:
    """A server that knows one hole in each name==version of `known`, mended in the version beside it."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = asked["package"]["name"]
            fixed = known.get(f"{name}=={asked['version']}")
            body = json.dumps({"vulns": [hole(name, fixed)]} if fixed else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Answers) as server:
        yield f"{url(server)}/v1/query"


def hole(name: str, fixed: str) -> dict[str, Any]:
    events = [{"introduced": "0"}, {"fixed": fixed}]
    affected = {"package": {"name": name, "ecosystem": "PyPI"}, "ranges": [{"type": "ECOSYSTEM", "events": events}]}
    return {"id": f"OSV-1-{name}", "summary": "a hole", "published": "2026-01-01T00:00:00Z", "affected": [affected]}


@pytest.fixture(scope="module")
def uv() -> str:
    found = subprocess.run([ROOT / "requirements" / "setup.sh", "uv"], capture_output=True, text=True)
    return found.stdout.strip() or shutil.which("uv") or absent("no uv")


def audited(uv: str, url: str, *locks: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--osv-url", url, *map(str, locks)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"UV": uv, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    )
    if "cannot be installed" in done.stdout:
        absent(done.stdout)
    return done


def test_every_lock_is_read_and_no_hole_is_no_failure(uv: str) -> None:
    with osv(BAD) as url:
        done = audited(uv, url)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith("no known vulnerabilities")
    assert int(last.split()[1]) > 150
    assert "not audited" not in done.stdout


def test_a_known_hole_fails_and_is_named_with_the_version_that_mends_it(uv: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("idna==3.6\ncertifi==2026.10.19.post1\n")
    with osv(BAD | {"idna==3.6": "3.7"}) as url:
        done = audited(uv, url, lock)
    assert done.returncode == 1
    assert "audit: idna 3.6: OSV-1-idna, fixed in 3.7" in done.stdout
    assert "2 packages, 1 known" in done.stdout


def test_data_that_knows_nothing_is_not_taken_for_a_clean_bill(uv: str, tmp_path: Path) -> None:
    with osv({}) as url:
        done = audited(uv, url)
    assert done.returncode == 0
    assert "NOT audited" in done.stdout
    assert "knows nothing of jinja2" in done.stdout


def test_data_that_cannot_be_had_is_one_line_and_no_failure(uv: str) -> None:
    done = audited(uv, "http://127.0.0.1:1/v1/query")
    assert done.returncode == 0
    assert done.stdout == "audit: NOT audited: http://127.0.0.1:1/v1/query cannot be reached\n"
    assert done.stderr == ""
