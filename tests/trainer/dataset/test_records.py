from __future__ import annotations

from pathlib import Path

from trainer.dataset import records
from trainer.dataset.records import Record


def test_a_record_comes_back_from_its_line_as_it_was(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 'línea\u2028 "x"\n'}, {"role": "assistant", "content": "🧪"}]
    record = Record(records.prompt_id(messages), 7, messages, [2, 105, 9, 106], [(2, 4)])
    assert "\n" not in record.to_json()
    file = tmp_path / "train.jsonl"
    file.write_text(record.to_json() + "\n" + record.to_json() + "\n", encoding="utf-8")
    assert list(records.read(file)) == [record, record]
    assert record.answer == "🧪" and record.prompt == messages[:1]
