"""What of a GGUF's header says how much memory the model will need. Format: ggml's docs/gguf.md."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from server.errors import ReleaseError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letters of the header's types of numbers."""
VOCABULARY = "tokenizer.ggml.tokens"
MAX_ITEMS = 1 << 24
"""Far beyond any header's; more means that the file is torn."""
GLOBAL_EVERY = 6
"""Gemma 3: every sixth layer sees the whole context, the others a window."""
BATCH = 512
"""llama.cpp's micro-batch: tokens that are computed at once."""


@dataclass(frozen=True)
class Shape:
    num_layers: int
    num_kv_heads: int
    key_length: int
    value_length: int
    window: int
    """Tokens that a local layer looks back; 0: every layer is global."""
    vocab_size: int

    def cache_bytes(self, num_ctx: int, slots: int) -> int:
        """Keys and values in 16 bit: global layers keep the context of every slot, local ones their window and a batch."""
        row = self.num_kv_heads * (self.key_length + self.value_length) * 2
        whole = num_ctx * slots
        num_global = self.num_layers // GLOBAL_EVERY if self.window else self.num_layers
        local = min(whole, self.window * slots + BATCH)
        return row * (num_global * whole + (self.num_layers - num_global) * local)

    @property
    def batch_bytes(self) -> int:
        """The largest buffer of a batch: its logits in float32."""
        return BATCH * self.vocab_size * 4


def read(path: Path) -> Shape:
    """Raises ReleaseError: no GGUF, or a header that ends too soon or lacks what llama.cpp needs."""
    try:
        with path.open("rb") as file:
            found = _header(file)
        kind = found["general.architecture"]
        heads = found.get(f"{kind}.attention.head_count_kv", found[f"{kind}.attention.head_count"])
        width = found[f"{kind}.embedding_length"] // found[f"{kind}.attention.head_count"]
        return Shape(
            num_layers=found[f"{kind}.block_count"],
            num_kv_heads=max(heads) if isinstance(heads, list) else heads,
            key_length=found.get(f"{kind}.attention.key_length", width),
            value_length=found.get(f"{kind}.attention.value_length", width),
            window=found.get(f"{kind}.attention.sliding_window", 0) if kind == "gemma3" else 0,
            vocab_size=found[VOCABULARY],
        )
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, ValueError) as error:
        raise ReleaseError(f"{path}: not a whole GGUF ({error}): copy the release again, or release again") from error
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ReleaseError(f"{path}: a GGUF whose header lacks {error}: release again") from error


def _header(file: IO[bytes]) -> dict[str, Any]:
    """Keys and values up to the vocabulary, of which only the size is kept: it is long, and what is wanted stands before it."""
    if file.read(4) != MAGIC:
        raise ValueError("it does not begin as one")
    version, _, num_keys = _unpack(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    found: dict[str, Any] = {}
    for _ in range(_sane(num_keys)):
        key = _string(file)
        (kind,) = _unpack(file, "I")
        if key == VOCABULARY:
            _, found[key] = _unpack(file, "IQ")
            break
        found[key] = _value(file, kind)
    return found


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        inner, count = _unpack(file, "IQ")
        return [_value(file, inner) for _ in range(_sane(count))]
    if kind not in NUMBERS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _unpack(file, NUMBERS[kind])[0]


def _string(file: IO[bytes]) -> str:
    (length,) = _unpack(file, "Q")
    return file.read(_sane(length)).decode("utf-8", "replace")


def _unpack(file: IO[bytes], letters: str) -> tuple[Any, ...]:
    layout = f"<{letters}"
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _sane(count: int) -> int:
    if count > MAX_ITEMS:
        raise ValueError(f"it counts {count} items")
    return count
