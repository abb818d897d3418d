from __future__ import annotations

from trainer import holders
from trainer.holders import Holder

LISTED = """\
1234, /usr/local/bin/ollama, 8120
77, /usr/bin/python3, 300
88, name, with comma, [N/A]
No running processes found
"""


def test_every_process_is_named_with_what_frees_its_memory() -> None:
    ollama, python, odd = holders.parse(LISTED)
    assert str(ollama) == "/usr/local/bin/ollama (pid 1234) holds 8.51 GB; free it with: ollama stop MODEL (ollama ps names it)"
    assert str(python) == "python3 (pid 77) holds 0.31 GB; free it with: kill 77"
    assert odd == Holder(88, "name, with comma", 0) and "unknown size" in str(odd)


def test_nobody_holds_anything_where_nobody_can_tell() -> None:
    assert holders.parse("") == []
