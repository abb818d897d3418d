"""A minute of a gateway whose Ollama is killed, frozen and reloaded under it: every client's outcome is accounted for. `make soak` takes fifteen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.real import absent, ollama_binary

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_no_outcome_is_unaccounted_while_the_engine_dies_and_comes_back(tmp_path: Path) -> None:
    if ollama_binary() is None:
        absent("no Ollama in PATH: name its binary in TRINITY_OLLAMA")
    command = [sys.executable, "-m", "bench.soak", "--case", "gateway_chaos", "--seconds", "60", "--at-least", "5", "--dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    tally = json.loads((tmp_path / "gateway_chaos" / "tally.json").read_text(encoding="utf-8"))
    assert set(tally["outcomes"]) == {"answered", "refused", "typed_error", "left"}
    assert sum(tally["outcomes"].values()) == tally["sent"] > 100
    assert len(tally["events"]) > 4
