from __future__ import annotations

import json
from pathlib import Path

from bench import rows


def test_a_row_holds_what_is_needed_to_compare_it_in_years(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    first = rows.append("x", "ours", {"preset": "tiny"}, {"wall_s": 1.5}, path)
    rows.append("x", "peer 1.0", {"preset": "tiny"}, {"wall_s": 3.0}, path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == first
    assert set(first) == {"bench", "who", "work", "metrics", "hardware", "versions", "commit", "run"}
    assert lines[0]["run"] == lines[1]["run"]
    assert first["hardware"]["cores"] >= 1
    assert first["versions"]["python"].startswith("3.")
    assert first["commit"]
