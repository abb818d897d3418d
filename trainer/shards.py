"""Safetensors files as plain bytes: read by mapping, written one tensor at a time, with numpy and nothing else.

The format (the safetensors project's README): 8 bytes little-endian length of a JSON header, the header, the tensors' bytes without gaps.
The header stands first but is known last, so a writer leaves room for it, appends, and fills the room at the end; spaces pad
it, as the format allows. bfloat16, which numpy has not, is handled as its 16 bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.errors import ModelError

Bits = npt.NDArray[Any]

INDEX = "model.safetensors.index.json"

# Bits of a tensor, by the format's name of its type; BF16 as unsigned integers.
_NUMPY: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "|u1", "I8": "|i1", "I32": "<i4", "I64": "<i8"}
_HEADER_BYTES = 256  # A tensor's room in the header: a name of some 90 characters, type, shape and two offsets take less.
_MAX_HEADER_BYTES = 100_000_000  # The format's own bound.


class Entry(NamedTuple):
    """One tensor inside one file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in the file, bytes."""
    num_bytes: int


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of one file, by its header.

    Raises:
        ModelError: not there, or not a safetensors file: cut short, or something else under that name.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
            total = file.seek(0, os.SEEK_END)
        found = {name: _entry(path, 8 + length, item) for name, item in header.items() if name != "__metadata__"}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; download the model again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); download the model again") from error
    if found and max(entry.start + entry.num_bytes for entry in found.values()) != total:
        raise ModelError(f"{path}: {total} bytes, its header says otherwise: the file is cut short; download the model again")
    return found


def _entry(path: Path, base: int, item: Mapping[str, Any]) -> Entry:
    start, end = item["data_offsets"]
    entry = Entry(path, item["dtype"], tuple(item["shape"]), base + start, end - start)
    if entry.dtype in _NUMPY and math.prod(entry.shape) * np.dtype(_NUMPY[entry.dtype]).itemsize != entry.num_bytes:
        raise ValueError("a tensor's shape and bytes disagree")
    return entry


def bits(entry: Entry) -> Bits:
    """A tensor's bits, mapped from the file: nothing is read before it is used."""
    if entry.dtype not in _NUMPY:
        raise ModelError(f"{entry.path}: a tensor of type {entry.dtype}; take the 16-bit model")
    if entry.num_bytes == 0:
        return np.zeros(entry.shape, _NUMPY[entry.dtype])
    return np.memmap(entry.path, _NUMPY[entry.dtype], "r", entry.start, entry.shape)


def floats(entry: Entry) -> npt.NDArray[np.float32]:
    """A tensor as float32, exactly."""
    raw = bits(entry)
    return widened(raw) if entry.dtype == "BF16" else raw.astype(np.float32)


def widened(bf16: Bits) -> npt.NDArray[np.float32]:
    """float32 from bfloat16 bits: they are its upper half."""
    wide = bf16.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def narrowed(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """bfloat16 bits of finite float32 values, rounded to nearest even."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (wide >> 16) & 1
    return ((wide + 0x7FFF + odd) >> 16).astype(np.uint16)


def joined(pieces: list[Bits]) -> Bits:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def files(directory: Path) -> list[Path]:
    """A checkpoint's files as its index names them; without an index, model.safetensors or what else ends so.

    Raises:
        ModelError: none, or one that the index names is not there.
    """
    index = directory / INDEX
    if not index.is_file():
        found = sorted(directory.glob("*.safetensors"))
        if not found:
            raise ModelError(f"{directory}: no *.safetensors in it; a model directory holds config.json, tokenizer.json and *.safetensors")
        return found
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: not a shard index ({error!r}); download the model again") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(*(f"{directory / name}: {INDEX} names it, but it is not there; download the model again" for name in missing))
    return [directory / name for name in names]


def tensors(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint directory, by the name that its file gives it. Only headers are read."""
    return {name: entry for path in files(directory) for name, entry in entries(path).items()}


@dataclass
class Shard:
    """One file being written. Use `writing`."""

    file: BinaryIO
    room: int
    header: dict[str, Any] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    late: list[tuple[str, str, tuple[int, ...], bytes]] = field(default_factory=list)
    end: int = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Bits | bytes) -> None:
        """Append a tensor. Odd lengths wait for the end, so that the others stay aligned for readers that map them."""
        raw = memoryview(data) if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if len(raw) % 4:
            self.late.append((name, dtype, shape, bytes(raw)))
        else:
            self._append(name, dtype, shape, raw)

    def _append(self, name: str, dtype: str, shape: tuple[int, ...], raw: memoryview | bytes) -> None:
        self.header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self.end, self.end + len(raw)]}
        self.file.write(raw)
        self.end += len(raw)

    def finish(self) -> None:
        for item in sorted(self.late, key=lambda item: len(item[3]) % 2):
            self._append(*item)
        header = json.dumps(self.header).encode().ljust(self.room)
        assert len(header) == self.room, "names longer than the room that was left for them"
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header)
        self.file.flush()
        os.fsync(self.file.fileno())


@dataclass
class Writer:
    """A checkpoint of several shards and their index, streamed: one tensor in memory."""

    directory: Path
    shard_bytes: int
    tensors_a_shard: int = 1024
    weight_map: dict[str, int] = field(default_factory=dict)
    total_bytes: int = 0
    _shard: Shard | None = None
    _count: int = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Bits | bytes) -> None:
        num_bytes = len(data) if isinstance(data, bytes) else data.nbytes
        if self._shard and (self._shard.end + num_bytes > self.shard_bytes or len(self._shard.header) > self.tensors_a_shard):
            self._close()
        if self._shard is None:
            self._count += 1
            room = 8 * math.ceil(_HEADER_BYTES * (self.tensors_a_shard + 2) / 8)
            file = self._part(self._count).open("xb")
            file.seek(8 + room)
            self._shard = Shard(file, room)
        self._shard.add(name, dtype, shape, data)
        self.weight_map[name] = self._count
        self.total_bytes += num_bytes

    def finish(self) -> list[Path]:
        """Close the last shard, give all their final names and write the index; returns the shards."""
        self._close()
        names = [f"model-{number:05d}-of-{self._count:05d}.safetensors" for number in range(1, self._count + 1)]
        for number, name in enumerate(names, start=1):
            self._part(number).rename(self.directory / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: names[number - 1] for name, number in sorted(self.weight_map.items())},
        }
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return [self.directory / name for name in names]

    def abandon(self) -> None:
        """Close without finishing, after an error: the file is no whole one and keeps its temporary name."""
        if self._shard:
            self._shard.file.close()

    def _close(self) -> None:
        if self._shard:
            self._shard.finish()
            self._shard.file.close()
            self._shard = None

    def _part(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.partial"
