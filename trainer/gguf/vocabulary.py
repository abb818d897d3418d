"""tokenizer.json -> the SentencePiece vocabulary that llama.cpp wants: a text, a score and a type for every id.

llama.cpp merges, over and over, the two neighbours that spell the piece with the highest score, leftmost first
(src/llama-vocab.cpp, llm_tokenizer_spm_session). BPE does the same by the rank of the pair. So a piece's score is minus
the rank of the first merge that makes it, and the two agree as long as all merges of one piece stand together in the list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import ModelError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""llama.h, enum llama_token_type."""

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER = -1000.0
"""Score of what is never made by merging."""


class Vocabulary(NamedTuple):
    tokens: list[bytes]
    scores: list[float]
    types: list[int]


def read(path: Path, num_rows: int) -> Vocabulary:
    """The vocabulary with as many entries as the embedding has rows.

    Some sizes pad the embedding (12B: 262,208 rows for 262,145 tokens). The rows are kept, since they take part in the
    softmax of the model that was trained, and get unused names.

    Raises:
        ModelError: not a byte-fallback BPE, or more tokens than rows.
    """
    tree = json.loads(path.read_text(encoding="utf-8"))
    model = tree["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ModelError(
            f"{path}: a {model.get('type')} tokenizer; Gemma 3's is BPE with byte fallback: fetch the model's own tokenizer.json"
        )
    by_id = {number: token for token, number in model["vocab"].items()}
    added = {item["id"]: item for item in tree.get("added_tokens", ())}
    last = max(by_id.keys() | added.keys())
    if last >= num_rows:
        raise ModelError(f"{path}: token {last} has no row in an embedding of {num_rows}; this tokenizer belongs to another model")
    ranks = _ranks(model["merges"])
    entries = [_entry(number, by_id, added, ranks) for number in range(num_rows)]
    tokens, scores, types = (list(column) for column in zip(*entries, strict=True))
    return Vocabulary(tokens, scores, types)


def _entry(number: int, by_id: Mapping[int, str], added: Mapping[int, Any], ranks: Mapping[str, int]) -> tuple[bytes, float, int]:
    if number in added:
        text = str(added[number]["content"])
        if added[number]["special"]:
            return text.encode(), _NEVER, CONTROL
        # llama.cpp looks for these in the raw text, before spaces are rewritten.
        return text.replace(_SPACE, " ").encode(), _NEVER, USER_DEFINED
    token = by_id.get(number)
    if token is None:
        return f"[PAD{number}]".encode(), _NEVER, UNUSED
    if _BYTE.fullmatch(token):
        return token.encode(), 0.0, BYTE
    return token.encode(), float(-ranks.get(token, len(ranks))), NORMAL


def _ranks(merges: list[Any]) -> dict[str, int]:
    """Order in which pieces are first made: 0, 1, 2... Both spellings of a merge occur, "a b" and ["a", "b"]."""
    ranks: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    return ranks
