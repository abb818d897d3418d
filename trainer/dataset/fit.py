"""Records for a context: the one rule for those that are too long, in prepare and where training lowers the context later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from trainer.dataset import clean, records, template
from trainer.dataset.records import Record
from trainer.oom import Lost


def shorter(tokenizer: Tokenizer, line: int, messages: Sequence[template.Message], max_tokens: int) -> Record | None:
    """The conversation without its oldest turns, rendered anew: the system text lives in the first user turn. None: nothing fits.

    Its id is of the prompt as it is now: what lost its beginning may have become another record's prompt.
    """
    kept = clean.shorten(messages, lambda some: len(template.encode(tokenizer, some)[0]), max_tokens)
    if kept is None:
        return None
    ids, spans = template.encode(tokenizer, kept)
    return Record(records.prompt_id(kept), line, kept, ids, spans)


def fitting(found: Iterable[Record], tokenizer: Tokenizer, max_tokens: int) -> Iterator[Record]:
    """The records as they are where they fit, shortened where that helps."""
    for record in found:
        if len(record.ids) <= max_tokens:
            yield record
        elif short := shorter(tokenizer, record.line, record.messages, max_tokens):
            yield short


def lost(found: Iterable[Record], tokenizer: Tokenizer, max_tokens: int) -> Lost:
    """What `fitting` would cost."""
    num_records = num_shortened = num_left_out = num_tokens = num_lost = 0
    for record in found:
        supervised = _supervised(record)
        num_records, num_tokens = num_records + 1, num_tokens + supervised
        if len(record.ids) <= max_tokens:
            continue
        short = shorter(tokenizer, record.line, record.messages, max_tokens)
        num_shortened, num_left_out = num_shortened + (short is not None), num_left_out + (short is None)
        num_lost += supervised - (_supervised(short) if short else 0)
    return Lost(num_records, num_shortened, num_left_out, num_tokens, num_lost)


def _supervised(record: Record) -> int:
    return sum(end - start for start, end in record.spans)
