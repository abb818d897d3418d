"""The NF4 state: what bitsandbytes itself would have made, kept, and never taken when it is not whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import gemma3, random_weights, shards
from trainer.backends import bitsandbytes as wall
from trainer.backends import hub
from trainer.config import Model
from trainer.errors import EditedError, ModelError, TornError
from trainer.gemma3 import SIZES

TINY = SIZES["tiny"]


def model(name: str | Path, **other: Any) -> Model:
    return Model(**({"name": str(name), "backend": "transformers", "device": "cpu", "dtype": "float32"} | other))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def state(cache: Path) -> Path:
    return wall.nf4_state(model("random:tiny"), cache, size=TINY)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory that a test may spoil."""
    assert random_weights.main([str(tmp_path / "source")]) == 0
    return tmp_path / "source"


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return loaded


def quantised_directly(directory: Path, layer: int, name: str, dtype: str, *, double: bool = True) -> Any:
    """bitsandbytes on the 16-bit tensor, without any of our code between; dequantised again."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors import safe_open

    wanted = gemma3.linear_name(layer, name).replace("model.", "language_model.model.", 1)
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if wanted in file.keys():  # noqa: SIM118 - no mapping
                values = file.get_tensor(wanted).to(getattr(torch, dtype))
                return dequantize_4bit(*quantize_4bit(values, blocksize=64, compress_statistics=double, quant_type="nf4"))
    raise AssertionError(wanted)


@pytest.mark.parametrize(("dtype", "double"), [("float32", True), ("bfloat16", True), ("float32", False)])
def test_stock_transformers_loads_bitwise_what_bitsandbytes_makes(cache: Path, dtype: str, double: bool) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    directory = wall.nf4_state(model("random:tiny", dtype=dtype, double_quant=double), cache)
    base = hub.weights(model("random:tiny"), cache)
    loaded, ours = load(directory), wall.Nf4Weights(directory)
    assert loaded.dtype == getattr(torch, dtype)
    for layer in range(TINY.num_layers):
        for name in TINY.linears():
            module = loaded.get_submodule(gemma3.linear_name(layer, name).removesuffix(".weight"))
            assert isinstance(module, Linear4bit) and module.compute_dtype == getattr(torch, dtype)
            found = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert found.dtype == getattr(torch, dtype)
            assert torch.equal(found, quantised_directly(base, layer, name, dtype, double=double))
            assert np.array_equal(ours.linear(layer, name), found.float().numpy())


def test_the_bitwise_comparison_can_fail(cache: Path, state: Path) -> None:
    ours = wall.Nf4Weights(state).linear(0, "q_proj")
    other = quantised_directly(hub.weights(model("random:tiny"), cache), 1, "q_proj", "float32").numpy()
    assert other.shape == ours.shape and not np.array_equal(other, ours)


def test_the_serialisation_is_bitsandbytes_own(state: Path, tmp_path: Path) -> None:
    """What the loaded model's state_dict saves has the same names, shapes and bytes. transformers 5.17 cannot save it itself."""
    from safetensors.torch import save_file

    saved = {name: value for name, value in load(state).state_dict().items() if name != "lm_head.weight"}
    save_file(saved, tmp_path / "model.safetensors")
    again, ours = shards.tensors(tmp_path), shards.tensors(state)
    assert again.keys() == ours.keys()
    for name in ours:
        if "_proj" in name:
            assert (ours[name].dtype, ours[name].shape) == (again[name].dtype, again[name].shape), name
            assert np.array_equal(shards.bits(again[name]), shards.bits(ours[name])), name
        else:
            assert np.array_equal(shards.floats(again[name]), shards.floats(ours[name])), name


def test_embedding_and_norms_are_the_source_s_bits_and_the_head_is_tied(cache: Path, state: Path) -> None:
    base = shards.tensors(hub.weights(model("random:tiny"), cache))
    ours, weights = shards.tensors(state), wall.Nf4Weights(state)
    for name in (gemma3.EMBEDDING, gemma3.FINAL_NORM, "model.layers.1.self_attn.k_norm.weight"):
        source = base[name.replace("model.", "language_model.model.", 1)]
        assert ours[name].dtype == "BF16" and np.array_equal(shards.bits(ours[name]), shards.bits(source))
        assert np.array_equal(weights.tensor(name), shards.floats(source))
    loaded = load(state)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_only_the_text_part_is_read_and_the_bytes_say_so(cache: Path, state: Path) -> None:
    notes, parts = wall.Nf4Weights(state).notes, wall.model_parts(state)
    base = shards.tensors(hub.weights(model("random:tiny"), cache))
    assert notes["read_bytes"] == 2 * TINY.num_parameters
    assert notes["read_bytes"] + notes["skipped_bytes"] == sum(entry.num_bytes for entry in base.values())
    assert parts["embedding"] == 2 * TINY.vocab_size * TINY.hidden_size
    assert parts["norms"] == 2 * (TINY.num_parameters - TINY.num_linear_parameters) - parts["embedding"]
    # Half a byte a weight, a byte a block of 64, a float32 for 256 of those, two code tables a matrix.
    packed = TINY.num_linear_parameters // 2 + TINY.num_linear_parameters // 64
    assert packed < parts["linears"] < packed + 14 * 3000
    assert not any("vision" in name or "multi_modal" in name for name in shards.tensors(state))
    assert not any("vision" in key for key in json.loads((state / "config.json").read_text()))


def test_the_forward_pass_is_near_that_of_the_16_bit_model_and_in_train_mode_the_same_as_in_eval(cache: Path, state: Path) -> None:
    import torch
    from bitsandbytes.functional import has_avx512bf16
    from transformers import Gemma3ForConditionalGeneration

    ids = torch.arange(3, 99)[None]
    loaded = load(state)
    wall.sound_on_cpu(loaded)
    with torch.no_grad():
        trained = loaded.train()(ids).logits
        asked = loaded.eval()(ids).logits
        again = loaded.train()(ids).logits
        whole = Gemma3ForConditionalGeneration.from_pretrained(hub.weights(model("random:tiny"), cache), dtype=torch.float32)(ids).logits
    assert torch.equal(trained, asked) and torch.equal(trained, again)
    assert torch.corrcoef(torch.stack([trained.flatten(), whole.flatten()]))[0, 1] > 0.97
    if has_avx512bf16():  # Sentinel: without sound_on_cpu such a CPU repacks the weights, and then this is seen.
        with torch.no_grad():
            spoilt = load(state)
            spoilt.eval()(ids)
        assert spoilt.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu


def test_sound_on_cpu_reaches_every_4bit_layer_also_under_peft(state: Path) -> None:
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(state), LoraConfig(r=4, use_dora=True, target_modules=list(TINY.linears())))
    wall.sound_on_cpu(adapted)
    layers = [module for module in adapted.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == TINY.num_layers * 7 and not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("fate", ["deleted", "whole directory deleted", "unreadable"])
def test_a_second_call_opens_no_16_bit_shard(source: Path, tmp_path: Path, fate: str) -> None:
    first = wall.nf4_state(model(source), tmp_path / "cache", size=TINY)
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    if fate == "whole directory deleted":
        shutil.rmtree(source)
    for path in source.glob("*.safetensors"):
        if fate == "deleted":
            path.unlink()
        else:  # Same size and times, no content: whoever opened it would fail, root too.
            status = path.stat()
            path.write_bytes(b"\0" * status.st_size)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert wall.nf4_state(model(source), tmp_path / "cache", size=TINY) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_a_changed_source_makes_another_state(source: Path, tmp_path: Path) -> None:
    first = wall.Nf4Weights(wall.nf4_state(model(source), tmp_path / "cache")).sha256
    key = json.loads((wall.nf4_state(model(source), tmp_path / "cache") / wall.RECORD).read_text())["key"]
    shutil.rmtree(source)
    assert random_weights.main([str(source), "--seed", "1"]) == 0
    second = wall.nf4_state(model(source), tmp_path / "cache")
    assert wall.Nf4Weights(second).sha256 != first
    assert json.loads((second / wall.RECORD).read_text())["key"] != key


def test_other_settings_have_states_of_their_own(cache: Path, state: Path) -> None:
    others = {wall.nf4_state(model("random:tiny", **other), cache) for other in ({"dtype": "bfloat16"}, {"double_quant": False})}
    assert len(others | {state}) == 3


def test_a_torn_state_is_not_taken(source: Path, tmp_path: Path) -> None:
    state = wall.nf4_state(model(source), tmp_path / "cache")
    sha256 = wall.Nf4Weights(state).sha256
    # Killed while writing: all but the record is there, and a half-filled directory beside it.
    (state / wall.RECORD).unlink()
    (state.with_name(state.name + ".partial")).mkdir()
    (state.with_name(state.name + ".partial") / "shard-00001.partial").write_bytes(b"half")
    with pytest.raises(TornError, match="not whole"):
        wall.Nf4Weights(state)
    assert wall.nf4_state(model(source), tmp_path / "cache") == state
    assert wall.Nf4Weights(state).sha256 == sha256
    # Cut short.
    shard = shards.files(state)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    wall.nf4_state(model(source), tmp_path / "cache")
    wall.verify(state)
    assert [path.name for path in state.parent.iterdir() if path.is_dir()] == [state.name]


def test_a_flipped_byte_is_found_when_asked(source: Path, tmp_path: Path) -> None:
    state = wall.nf4_state(model(source), tmp_path / "cache")
    wall.verify(state)
    shard = shards.files(state)[0]
    status, data = shard.stat(), bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(EditedError, match=rf"{shard.name}: its content changed.*delete"):
        wall.verify(state)


def test_missing_and_misshapen_tensors_are_named(source: Path, tmp_path: Path) -> None:
    found = shards.tensors(source)
    kept = {name: (entry.dtype, entry.shape, np.array(shards.bits(entry))) for name, entry in found.items()}
    for path in shards.files(source):
        path.unlink()
    writer = shards.Writer(source, 10_000_000)
    for name, (dtype, shape, data) in kept.items():
        if name.endswith("layers.1.mlp.up_proj.weight"):
            continue
        turned = shape[::-1] if name.endswith("layers.0.self_attn.k_proj.weight") else shape
        writer.add(name, dtype, turned, data)
    writer.finish()
    with pytest.raises(ModelError) as caught:
        wall.nf4_state(model(source), tmp_path / "cache")
    assert "no tensor model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "model.layers.0.self_attn.k_proj.weight is [256, 128], config.json asks for [128, 256]" in str(caught.value)
    assert not [path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir()]


def test_values_that_are_not_finite_are_refused(source: Path, tmp_path: Path) -> None:
    entry = shards.tensors(source)["language_model.model.layers.1.mlp.up_proj.weight"]
    with entry.path.open("r+b") as file:
        file.seek(entry.start + 100)
        file.write(b"\x80\x7f")  # bfloat16 infinity
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        wall.nf4_state(model(source), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir()]


def test_another_model_a_quantised_one_and_another_size_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another size than was asked for"):
        wall.nf4_state(model(source), tmp_path / "a", size=SIZES["12b"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ModelError, match="quantised already; take the 16-bit one"):
        wall.nf4_state(model(source), tmp_path / "b")
    (source / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    with pytest.raises(ModelError, match=r"model_type is 'qwen3'.*set model\.name=unsloth/gemma-3-12b-it"):
        wall.nf4_state(model(source), tmp_path / "c")


def test_the_state_has_its_tokenizer(state: Path, cache: Path) -> None:
    from transformers import AutoTokenizer

    ours = hub.tokenizer_json(model("random:tiny"), cache)
    assert (state / "tokenizer.json").read_bytes() == ours.read_bytes()
    text = "<start_of_turn>user\nevery day<end_of_turn>\n"
    assert AutoTokenizer.from_pretrained(state)(text)["input_ids"] == AutoTokenizer.from_pretrained(ours.parent)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(state)(text)["input_ids"][:2] == [2, 105]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_in_chunks_are_those_that_the_forward_pass_reads(double_quant: bool, dtype: str) -> None:
    """To the bit; the last chunk is short, and double quantisation's blocks of 256 scales cross chunks."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    values = torch.randn(200, 192, generator=torch.Generator().manual_seed(4)).to(getattr(torch, dtype))
    weight = Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=double_quant).to("cpu")
    chunks = list(wall.row_chunks(weight, 64))
    assert [len(chunk) for chunk in chunks] == [64, 64, 64, 8]
    assert torch.equal(torch.cat(chunks), dequantize_4bit(weight.data, weight.quant_state))


@pytest.mark.gpu
def test_cuda_makes_and_loads_a_float16_state_too(tmp_path: Path) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit

    on_cuda = wall.nf4_state(model("random:tiny", device="cuda", dtype="float16"), tmp_path / "a")
    on_cpu = wall.nf4_state(model("random:tiny", device="cpu", dtype="float32"), tmp_path / "b")
    loaded, ours, other = load(on_cuda), wall.Nf4Weights(on_cuda), wall.Nf4Weights(on_cpu)
    assert loaded.device.type == "cuda" and loaded.dtype == torch.float16
    for layer in range(TINY.num_layers):
        for name in TINY.linears():
            weight = loaded.get_submodule(gemma3.linear_name(layer, name).removesuffix(".weight")).weight
            found = dequantize_4bit(weight.data, weight.quant_state)
            assert np.array_equal(found.float().cpu().numpy(), ours.linear(layer, name))
            # The CPU's codes may differ where a weight lies on a bound, and by float16's rounding.
            assert np.mean(np.abs(other.linear(layer, name) - ours.linear(layer, name)) > 1e-3) < 1e-3
    assert loaded(torch.arange(3, 99, device="cuda")[None]).logits.isfinite().all()
