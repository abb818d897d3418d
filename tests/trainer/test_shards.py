"""Safetensors as plain bytes: what we write others read, and the other way round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer import shards
from trainer.errors import ModelError


def written(directory: Path, shard_bytes: int = 100) -> dict[str, shards.Bits]:
    rng = np.random.default_rng(1)
    arrays: dict[str, shards.Bits] = {
        "odd": rng.integers(0, 255, 7, dtype=np.uint8),
        "wide": rng.standard_normal((5, 6)).astype(np.float32),
        "half": rng.standard_normal(3).astype(np.float16),
        "bytes": np.frombuffer(b'{"a": 1}', np.uint8),
    }
    names = {"|u1": "U8", "<f4": "F32", "<f2": "F16"}
    writer = shards.Writer(directory, shard_bytes)
    for name, array in arrays.items():
        writer.add(name, names[array.dtype.str], array.shape, array)
    writer.finish()
    return arrays


@pytest.mark.parametrize("shard_bytes", [100, 10_000])
def test_the_safetensors_library_reads_what_we_write(tmp_path: Path, shard_bytes: int) -> None:
    from safetensors.numpy import load_file

    arrays = written(tmp_path, shard_bytes)
    found = {name: value for path in shards.files(tmp_path) for name, value in load_file(path).items()}
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    values = torch.randn(4, 8)
    save_file({"a": values, "b": values.bfloat16(), "c": torch.zeros(0)}, tmp_path / "model.safetensors")
    found = shards.tensors(tmp_path)
    assert np.array_equal(shards.floats(found["a"]), values.numpy())
    assert np.array_equal(shards.floats(found["b"]), values.bfloat16().float().numpy())
    assert shards.bits(found["c"]).size == 0


def test_rounding_to_bfloat16_is_torch_s() -> None:
    import torch

    rng = np.random.default_rng(2)
    values = np.concatenate([rng.standard_normal(20_000), [0.0, -0.0, 1.00390625, 1.01171875, 3e38, 1e-40]]).astype(np.float32)
    assert np.array_equal(shards.narrowed(values), torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(shards.widened(shards.narrowed(values)), torch.from_numpy(values).bfloat16().float().numpy())


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 10_000)
    (path,) = shards.files(tmp_path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model-00001-of-00001\.safetensors: .*download the model again"):
            shards.tensors(tmp_path)


def test_a_shard_that_the_index_names_and_nobody_has_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    shards.files(tmp_path)[1].unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-0000\d\.safetensors: .*not there"):
        shards.files(tmp_path)
