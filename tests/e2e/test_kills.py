"""kill -9 of train and export at random moments never leaves an artefact that reads as whole. `make soak` does 100 of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
@pytest.mark.parametrize("case", ["train_kills", "export_kills"])
def test_a_kill_at_any_moment_leaves_nothing_torn(case: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.soak", "--case", case, "--seconds", "60", "--at-least", "5", "--dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " 0 torn, 0 lost, 0 failed" in done.stdout
