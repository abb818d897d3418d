"""A tokenizer for tests: Gemma's special ids, bytes, ASCII and some pieces, in under 600 tokens, built as the real one is.

Like SentencePiece's, its merges follow from the vocabulary (trainer/tokenizer.py says how), so a GGUF made from it
tokenizes alike.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from trainer.tokenizer import BOS, BOS_ID, END_OF_TURN, END_OF_TURN_ID, EOS, PAD, SPACE, START_OF_TURN, START_OF_TURN_ID, UNK

VERSION = 1

_PIECES = (
    "th he in er an re on at en nd or es te ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea ra ce li ch "
    "ll be ma si om ur the and ing ion ent for her ter hat tha ere ate his con res ver all ons nce men ith ted ers pro thi wit are "
    "ess not ive was ect rea com eve per int est _t _a _s _o _the _and _of _to _in _ev _every _day _at _on _min minu minut minute "
    "hour _mo _w very every 00 10 12 15 30"
)


def tokenizer() -> Tokenizer:
    tokens = _tokens()
    ids = {token: number for number, token in enumerate(tokens)}
    special = [PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN]
    made = Tokenizer(models.BPE(vocab=ids, merges=_merges(ids, frozenset(special)), unk_token=UNK, fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)])
    return made


def _tokens() -> list[str]:
    """In order of id: special, unused up to the turn markers, line breaks, bytes, characters, pieces."""
    head = [PAD, EOS, BOS, UNK, "<mask>"]
    head += [f"<unused{number}>" for number in range(START_OF_TURN_ID - len(head))]
    head += [START_OF_TURN, END_OF_TURN]
    assert len(head) == END_OF_TURN_ID + 1
    characters = [SPACE, *(chr(code) for code in range(33, 127))]
    pieces = [piece.replace("_", SPACE) for piece in _PIECES.split()]
    return list(dict.fromkeys([*head, "\n", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "\n\n", *pieces]))


def _merges(ids: dict[str, int], special: frozenset[str]) -> list[tuple[str, str]]:
    """Every split of a token into two others; an earlier token wins, then the earlier parts."""
    merges = []
    for token in ids:
        if len(token) < 2 or token.startswith("<"):
            continue
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [(left, right) for left, right in halves if left in ids and right in ids and not {left, right} & special]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
