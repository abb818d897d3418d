"""Gemma 3's tokenizer as a `tokenizers.Tokenizer`, from the hub's tokenizer.json or from a GGUF; never through transformers.

transformers 5.17 reads a GGUF's SentencePiece vocabulary as Unigram: text falls apart into single characters, the turn
markers are torn, and nothing warns. What llama.cpp really does with it is BPE whose merges follow from the vocabulary: a
piece may be merged from any two pieces that spell it, the piece with the higher score first. That is what from_gguf builds.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from trainer.errors import ModelError

PAD, PAD_ID = "<pad>", 0
EOS, EOS_ID = "<eos>", 1
BOS, BOS_ID = "<bos>", 2
UNK, UNK_ID = "<unk>", 3
START_OF_TURN, START_OF_TURN_ID = "<start_of_turn>", 105
END_OF_TURN, END_OF_TURN_ID = "<end_of_turn>", 106

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece writes a space as this."""

# llama.h, enum llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Vocabulary(NamedTuple):
    """A SentencePiece vocabulary as a GGUF keeps it: place in the list = token id."""

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]


def load(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Truncation and padding, which some files carry, are switched off.

    Raises:
        ModelError: no such file, not a tokenizer, or not Gemma 3's special tokens.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a model directory must hold tokenizer.json")
    # tokenizers raises a bare Exception for whatever is wrong with a file; the one accident that happens is half a file.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise ModelError(f"{path}: not a whole tokenizer.json; delete it and fetch it again")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _checked(tokenizer, path)


def from_gguf(path: Path) -> Tokenizer:
    """Build the tokenizer of a Gemma 3 GGUF: same ids as llama.cpp for the same text.

    Raises:
        ModelError: not a GGUF, or one with another kind of vocabulary.
    """
    vocabulary = read_vocabulary(path)
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_merges(vocabulary, ids), unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    kinds = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    tokenizer.add_special_tokens([_added(token, special=True) for token, kind in kinds if kind in (CONTROL, UNKNOWN)])
    tokenizer.add_tokens([_added(token, special=False) for token, kind in kinds if kind == USER_DEFINED])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return _checked(tokenizer, path)


def _added(token: str, *, special: bool) -> AddedToken:
    # Not normalised: llama.cpp looks for these in the text as it is, before spaces are rewritten.
    return AddedToken(token, special=special, normalized=False)


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to spell a normal piece with two others, in the order in which BPE must prefer them.

    Pieces by descending score; within a piece by the ids of its parts.
    """
    whole = [number for number, kind in enumerate(vocabulary.types) if kind == NORMAL]
    whole.sort(key=lambda number: -vocabulary.scores[number])
    barred = {vocabulary.tokens[number] for number, kind in enumerate(vocabulary.types) if kind in (CONTROL, UNKNOWN)}
    parts = {token: number for token, number in ids.items() if token not in barred}
    merges: list[tuple[str, str]] = []
    for number in whole:
        token = vocabulary.tokens[number]
        found = []
        for cut in range(1, len(token)):
            left, right = parts.get(token[:cut]), parts.get(token[cut:])
            if left is not None and right is not None:
                found.append((left, right))
        found.sort()
        merges += [(vocabulary.tokens[left], vocabulary.tokens[right]) for left, right in found]
    return merges


def _checked(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer, if its special tokens are where every Gemma 3 has them."""
    wanted = {PAD: PAD_ID, EOS: EOS_ID, BOS: BOS_ID, UNK: UNK_ID, START_OF_TURN: START_OF_TURN_ID, END_OF_TURN: END_OF_TURN_ID}
    wrong = [
        f"{token} is {tokenizer.token_to_id(token)}, not {number}"
        for token, number in wanted.items()
        if tokenizer.token_to_id(token) != number
    ]
    if wrong:
        raise ModelError(f"{path}: not Gemma 3's vocabulary: {'; '.join(wrong)}; take a Gemma 3 model")
    return tokenizer


# GGUF metadata, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: little-endian; magic, version, number of tensors,
# number of pairs, then (key, type, value) each. gguf.GGUFReader takes 10 s for what takes 0.3 s here: it wraps each string in arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VOCABULARY = "tokenizer.ggml."


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a GGUF's metadata; no tensor is touched.

    Raises:
        ModelError: no such file, cut short, not a GGUF, or without a SentencePiece ("llama") vocabulary.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ModelError(f"{path}: no such file, or an empty one; a GGUF of Gemma 3 is needed")
    pairs: dict[str, Any] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            pairs.update((key, value) for key, value in _pairs(data) if key.startswith(_VOCABULARY))
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ModelError(f"{path}: not a whole GGUF ({error}); fetch or build it again") from error
    model = pairs.get(f"{_VOCABULARY}model")
    if model != "llama":
        raise ModelError(f"{path}: its vocabulary is {model!r}, not SentencePiece ('llama') as every Gemma 3 has; take a Gemma 3 GGUF")
    return Vocabulary(pairs[f"{_VOCABULARY}tokens"], pairs[f"{_VOCABULARY}scores"], pairs[f"{_VOCABULARY}token_type"])


def _pairs(data: mmap.mmap) -> Iterator[tuple[str, Any]]:
    magic, _version, _num_tensors, num_pairs = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF":
        raise KeyError(f"it begins with {magic!r}")
    at = 24
    for _ in range(num_pairs):
        key, at = _value(data, at, _STRING)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = _value(data, at + 4, kind)
        yield key, value


def _value(data: mmap.mmap | bytes, at: int, kind: int) -> tuple[Any, int]:
    """The value of a type at an offset, and the offset after it."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        raw = data[at + 8 : at + 8 + length]
        return raw.decode(), at + 8 + length
    if kind != _ARRAY:
        layout = "<" + _SCALARS[kind]
        return struct.unpack_from(layout, data, at)[0], at + struct.calcsize(layout)
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in _SCALARS:
        layout = f"<{count}{_SCALARS[item]}"
        return struct.unpack_from(layout, data, at), at + struct.calcsize(layout)
    values = []
    for _ in range(count):
        value, at = _value(data, at, item)
        values.append(value)
    return values, at
