"""Write a Gemma 3 GGUF in one pass: header first, then every tensor merged, quantised and appended a block of rows at a time.

In memory are one or two matrices of the base in float32 and a few blocks, whatever the model's size. The main thread fetches
the base's matrices, threads merge and quantise blocks (numpy and ggml let go of the interpreter), results are written in order.

It reads back what it wrote: the first row of every matrix is dequantised by `gguf`'s own numpy code and held against the
merged row while it is at hand, and in the end the file's hash is taken from the disk. Its tables are read by llama.cpp in verify.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from trainer.errors import ArtifactError, ModelError
from trainer.gemma3 import Size
from trainer.gguf import merge, names, recipes, vocabulary
from trainer.gguf.merge import Adapter, Array, Part, Rows
from trainer.gguf.names import Tensor

BLOCK_VALUES = 1 << 22
"""Weights of a block: 16 MiB of float32, large enough that threads are busy."""

ALIGNMENT = 32
MAX_ROW_ERROR = {Type.Q4_K: 0.15, Type.Q5_0: 0.12, Type.Q6_K: 0.06, Type.Q8_0: 0.03, Type.F16: 0.002}
"""RMS error of a dequantised row relative to the row, about twice what Gaussian weights give."""

Bytes = npt.NDArray[np.uint8]
Quantize = Callable[[Array, Type], Bytes]
"""Rows of float32 to rows of bytes."""


class Base(Protocol):
    """The base weights as float32, [out, in] and [width]."""

    def linear(self, layer: int, name: str) -> Rows: ...

    def tensor(self, name: str) -> Rows: ...


class Plan(NamedTuple):
    tensor: Tensor
    kind: Type
    num_bytes: int


class Written(NamedTuple):
    sha256: str
    num_bytes: int
    types: dict[str, int]
    """Tensors a type."""


def plan(size: Size, quantization: str) -> list[Plan]:
    """Type and bytes of every tensor, in the order of the file."""
    recipe = recipes.RECIPES[quantization]
    plans = []
    for tensor in names.tensors(size):
        kind = recipes.type_of(tensor, recipe, size.num_layers)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        plans.append(Plan(tensor, kind, int(np.prod(tensor.shape)) // block * block_bytes))
    return plans


def num_bytes(size: Size, quantization: str) -> int:
    """What the file will take, within a few MB of metadata."""
    return sum(item.num_bytes for item in plan(size, quantization)) + (size.vocab_size + 4096) * 32


def write(
    path: Path,
    size: Size,
    base: Base,
    adapter: Adapter | None,
    tokenizer_json: Path,
    *,
    name: str,
    chat_template: str,
    quantization: str,
    quantize: Quantize,
    threads: int,
    advance: Callable[[float], None],
    block_values: int = BLOCK_VALUES,
) -> Written:
    """Write the file; `advance` is told the bytes of tensors as they are done.

    Raises:
        ModelError: a base whose tensors do not have their size's shapes, or a size that llama.cpp would run with another scale.
        ArtifactError: what is on the disk is not what was written.
    """
    plans = plan(size, quantization)
    _header(path, size, plans, vocabulary.read(tokenizer_json, size.vocab_size), name, chat_template, quantization)
    digest = hashlib.sha256(path.read_bytes())
    with path.open("ab") as file, ThreadPoolExecutor(threads) as pool:
        _pad(file, digest)
        in_flight: deque[tuple[Future[Bytes], bool]] = deque()
        for item in plans:
            for work, last in _blocks(item, base, adapter, quantize, block_values):
                in_flight.append((pool.submit(work), last))
                if len(in_flight) > 2 * threads:
                    advance(_take(in_flight, file, digest))
        while in_flight:
            advance(_take(in_flight, file, digest))
        file.flush()
        os.fsync(file.fileno())
    _read_back(path, digest.hexdigest())
    return Written(digest.hexdigest(), path.stat().st_size, dict(Counter(item.kind.name for item in plans)))


def _take(in_flight: deque[tuple[Future[Bytes], bool]], file: BinaryIO, digest: hashlib._Hash) -> float:
    """Append the oldest block, and the padding after a tensor's last one; returns its bytes."""
    future, last = in_flight.popleft()
    data = future.result()
    file.write(data.data)
    digest.update(data.data)
    if last:
        _pad(file, digest)
    return float(data.nbytes)


def _pad(file: BinaryIO, digest: hashlib._Hash) -> None:
    zeros = bytes(-file.tell() % ALIGNMENT)
    file.write(zeros)
    digest.update(zeros)


def _blocks(
    item: Plan, base: Base, adapter: Adapter | None, quantize: Quantize, block_values: int
) -> Iterator[tuple[Callable[[], Bytes], bool]]:
    """The pieces of work of one tensor, each with whether it is the last."""
    tensor, kind = item.tensor, item.kind
    weights = _fetch(tensor, base)
    if len(tensor.shape) == 1:
        # Gemma's RMSNorm multiplies by 1 + w; llama.cpp's graph by what the file holds.
        norm = (weights[:] + np.float32(1)).view(np.uint8)
        yield (lambda: norm), True
        return
    part = adapter.parts.get((tensor.layer, tensor.linear)) if adapter and tensor.layer is not None and tensor.linear else None
    scale = adapter.scale if adapter else 0.0
    rows = max(1, block_values // tensor.shape[1])
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        yield _block(weights, part, scale, start, stop, kind, quantize, tensor.gguf), stop == tensor.shape[0]


def _block(
    weights: Rows, part: Part | None, scale: float, start: int, stop: int, kind: Type, quantize: Quantize, name: str
) -> Callable[[], Bytes]:
    def work() -> Bytes:
        rows = np.ascontiguousarray(merge.merged(weights, part, scale, start, stop))
        data = rows.astype(np.float16).view(np.uint8) if kind == Type.F16 else quantize(rows, kind)
        if start == 0:
            _check_row(rows[0], data[0], kind, name)
        return data.reshape(-1)

    return work


def _check_row(row: Array, data: Bytes, kind: Type, name: str) -> None:
    """Raises ArtifactError where the quantised row does not read as the row."""
    back = gguf.dequantize(data, kind)
    error = float(np.linalg.norm(back - row))
    if not error <= MAX_ROW_ERROR[kind] * float(np.linalg.norm(row)):
        raise ArtifactError(
            f"{name}: the quantised row differs from the merged one by {error:.3g} ({kind.name}); "
            "the weights are not finite, or the quantiser is broken: train again, or run make setup"
        )


def _fetch(tensor: Tensor, base: Base) -> Rows:
    weights = base.linear(tensor.layer, tensor.linear) if tensor.layer is not None and tensor.linear else base.tensor(tensor.hf)
    if weights.shape != tensor.shape:
        raise ModelError(
            f"{tensor.hf}: shape {list(weights.shape)}, but its config.json makes it {list(tensor.shape)}; fetch the model again"
        )
    return weights


def _header(
    path: Path, size: Size, plans: list[Plan], words: vocabulary.Vocabulary, name: str, chat_template: str, quantization: str
) -> None:
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA3])
    _add_model(writer, size, name, quantization)
    _add_vocabulary(writer, words, chat_template)
    for item in plans:
        kind = np.dtype(np.float32)  # only looked at where raw_dtype is None
        writer.add_tensor_info(item.tensor.gguf, item.tensor.shape, kind, item.num_bytes, raw_dtype=item.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_model(writer: gguf.GGUFWriter, size: Size, name: str, quantization: str) -> None:
    """llama.cpp's keys for Gemma 3 (src/models/gemma3.cpp). What equals its defaults is left out, as upstream's converter does."""
    if abs(size.query_pre_attn_scalar - _attention_scalar(size)) > 1e-6:
        raise ModelError(
            f"query_pre_attn_scalar = {size.query_pre_attn_scalar:g}: llama.cpp scales attention of a Gemma 3 with {size.num_layers} layers "
            f"by {_attention_scalar(size):g}; only Google's sizes can be exported"
        )
    writer.add_type("model")
    writer.add_name(name)
    writer.add_license("gemma")
    writer.add_file_type(recipes.RECIPES[quantization].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(size.max_positions)
    writer.add_embedding_length(size.hidden_size)
    writer.add_block_count(size.num_layers)
    writer.add_feed_forward_length(size.intermediate_size)
    writer.add_head_count(size.num_heads)
    writer.add_head_count_kv(size.num_kv_heads)
    writer.add_key_length(size.head_dim)
    writer.add_value_length(size.head_dim)
    writer.add_layer_norm_rms_eps(size.rms_norm_eps)
    writer.add_rope_freq_base(size.rope_theta)
    writer.add_sliding_window(size.sliding_window)
    if size.sliding_pattern != 6:
        writer.add_sliding_window_pattern(size.sliding_pattern)
    if size.rope_local_theta != 10_000:
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", size.rope_local_theta)
    if size.rope_scaling and size.rope_scaling != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(size.rope_scaling)


def _attention_scalar(size: Size) -> float:
    return size.hidden_size / size.num_heads if size.num_layers == 62 else size.head_dim


def _add_vocabulary(writer: gguf.GGUFWriter, words: vocabulary.Vocabulary, chat_template: str) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words.tokens)
    writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_eot_token_id(106)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat_template)


def _read_back(path: Path, written: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != written:
        raise ArtifactError(
            f"{path}: the disk gives back other bytes than were written (sha256 {digest[:12]}, not {written[:12]}); "
            "check the disk, then export again"
        )
