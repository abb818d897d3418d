from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from trainer import tokenizer
from trainer.dataset import fit, records, template
from trainer.dataset.records import Record


@pytest.fixture
def reader(tiny_prepared: Path) -> Tokenizer:
    return tokenizer.load(tiny_prepared / "tokenizer.json")


def conversation(reader: Tokenizer, *words: int) -> Record:
    """A system text and as many turns, each question with so many words."""
    messages = [{"role": "system", "content": "be brief"}]
    for number in words:
        messages += [{"role": "user", "content": " ".join(["noon"] * number)}, {"role": "assistant", "content": "5 5 5"}]
    ids, spans = template.encode(reader, messages)
    return Record(records.prompt_id(messages), 7, messages, ids, spans)


def test_what_fits_stays_and_what_does_not_loses_its_oldest_turns_but_not_the_system_text(reader: Tokenizer) -> None:
    short, long, hopeless = (conversation(reader, *words) for words in ((3,), (200, 3), (3, 200)))
    context = len(long.ids) - 1
    kept, shortened = fit.fitting([short, long, hopeless], reader, min(context, len(short.ids) + 5))
    assert kept is short
    assert shortened == short, "rendered anew: the system text moved to the turn that is the first now, and the id with the prompt"


def test_what_a_context_costs_is_counted_in_records_and_supervised_tokens(reader: Tokenizer) -> None:
    short, long, hopeless = (conversation(reader, *words) for words in ((3,), (200, 3), (3, 200)))
    lost = fit.lost([short, long, hopeless], reader, len(short.ids))
    answer = sum(end - start for start, end in short.spans)
    assert (lost.num_records, lost.num_shortened, lost.num_left_out) == (3, 1, 1)
    assert (lost.num_tokens, lost.num_tokens_lost) == (5 * answer, 3 * answer)
    assert fit.lost([short, long], reader, len(long.ids)).share == 0
