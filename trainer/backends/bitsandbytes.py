"""The base model as bitsandbytes' NF4: made once by streaming the 16-bit shards, kept, loaded as it is ever after.

The state is an ordinary pre-quantised checkpoint of the text-only model: config.json of a Gemma3ForCausalLM with a
quantization_config; the seven matrices of each layer as bitsandbytes serialises them (`X.weight` packed, two weights a byte,
high half first; `X.weight.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map`, `.quant_state.bitsandbytes__nf4`); embedding and
norms in 16 bits; no vision tensors. AutoModelForCausalLM.from_pretrained reads it with no further argument.

NF4 (QLoRA, arXiv 2305.14314, section 3): blocks of 64 weights share absmax; a weight is one of 16 quantiles of a normal times
absmax. Double quantisation: absmax itself is offset + 8-bit code times a float32 scale for each 256 of them.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainer import cache, gemma3, progress, random_weights, shards
from trainer.backends import hub
from trainer.config import Model
from trainer.errors import MachineError, ModelError

if TYPE_CHECKING:
    import torch

RECORD = "nf4.json"
BLOCK = 64
VERSION = 1
"""Raised when the same weights give another state."""

_SHOWN = 10
_SHARD_BYTES = 2_000_000_000
_STATE = "quant_state.bitsandbytes__nf4"

Floats = npt.NDArray[np.float32]


def nf4_state(model: Model, cache_dir: Path, *, size: gemma3.Size | None = None) -> Path:
    """The directory of the model's NF4 state; made now if the cache has none that fits.

    A state that fits is taken without opening a 16-bit file, and even if those have been deleted; one whose source's files
    changed is made again.

    Raises:
        ModelError: no Gemma 3, tensors missing or of the wrong shape, already quantised, or not the `size` that was asked for.
        MachineError: no room, no CUDA card though model.device says so.
    """
    target = _target(model, cache_dir)
    with cache.locked(target):
        now = hub.identity(model, cache_dir)
        entry = cache.find(target, RECORD)
        if entry is None or entry.key != _key(model, {**entry.notes["source"], **now}):
            _build(model, cache_dir, target)
    found = gemma3.read(target / "config.json")
    if size is not None and found != size:
        described = f"{found.num_layers} layers of {found.hidden_size}"
        raise ModelError(f"model.name={model.name}: another size than was asked for: its config.json describes {described}")
    return target


def sha256(directory: Path) -> str:
    """Hash over the state's files, as recorded when it was made. Raises TornError where the directory is no whole state."""
    return cache.open_record(directory, RECORD).sha256


def require_same(directory: Path, trained_sha256: str) -> None:
    """Raises ModelError when the state is not the one that the adapter was trained on (its base's files were replaced since)."""
    found = sha256(directory)
    if found != trained_sha256:
        raise ModelError(
            f"{directory}: these base weights (sha256 {found[:12]}...) are not those that the adapter was trained on ({trained_sha256[:12]}...): "
            "bring the base model's files of then back, or train again: --set run.fresh=true"
        )


def verify(directory: Path) -> None:
    """Hash the whole state. Raises TornError or EditedError, naming every file that is wrong."""
    cache.verify(directory, RECORD)


def model_parts(directory: Path) -> dict[str, int]:
    """Bytes a part of the state: linears (NF4 with their scales), embedding, norms."""
    parts = {"linears": 0, "embedding": 0, "norms": 0}
    for name, entry in shards.tensors(directory).items():
        part = "embedding" if name == gemma3.EMBEDDING else "norms" if name.endswith("norm.weight") else "linears"
        parts[part] += entry.num_bytes
    return parts


def sound_on_cpu(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first forward in eval mode.

    On a CPU with AVX512-BF16 it does so, and whatever reads the weight as NF4 afterwards (PEFT's DoRA norm does) gets
    garbage without an error (measured with 0.50.2). Call it before the first forward; it may be called twice.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False), f"{name} has been repacked already"
            module.support_avx512bf16_for_cpu = False


def row_chunks(weight: Any, rows: int) -> Iterator[torch.Tensor]:
    """The rows of a loaded matrix (a Params4bit), `rows` at a time, as the forward pass dequantises them: [<= rows, I] in its dtype."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    from trainer.kernels import nf4

    packed, dtype = nf4.of(weight), weight.quant_state.dtype
    (out, wide), scales = packed.shape, packed.scales()
    for start in range(0, out, rows):
        shape = (min(rows, out - start), wide)
        first, last = start * wide, (start + shape[0]) * wide
        codes, absmax = packed.codes[first // 2 : last // 2], scales[first // BLOCK : last // BLOCK]
        state = QuantState(absmax, shape=shape, code=packed.table, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        yield dequantize_4bit(codes.view(-1, 1), state)


class Nf4Weights:
    """The state as numpy arrays, one tensor at a time: what a merge starts from. Needs neither torch nor bitsandbytes."""

    def __init__(self, directory: Path) -> None:
        entry = cache.open_record(directory, RECORD)
        self.sha256 = entry.sha256
        self.notes = entry.notes
        self.size = gemma3.read(directory / "config.json")
        self._entries = shards.tensors(directory)

    def linear(self, layer: int, name: str) -> Floats:
        """A layer's matrix [out, in], dequantised as training does it: code * absmax, rounded to the state's dtype."""
        weight = gemma3.linear_name(layer, name)
        meta = json.loads(bytes(self._bits(f"{weight}.{_STATE}")))
        pairs = _pairs(self._bits(f"{weight}.quant_map"))
        packed = self._bits(weight).reshape(-1)
        values = pairs.view(np.uint64)[packed, 0].view(np.float32).reshape(-1, meta["blocksize"])
        values *= self._absmax(weight, meta)[:, None]
        return _rounded(values, meta["dtype"]).reshape(meta["shape"])

    def tensor(self, name: str) -> Floats:
        """A norm or the embedding, by its text-only name (`model.layers.0.input_layernorm.weight`)."""
        return shards.floats(self._entry(name))

    def _absmax(self, weight: str, meta: dict[str, Any]) -> Floats:
        absmax = self._bits(f"{weight}.absmax")
        if "nested_offset" not in meta:
            return np.asarray(absmax, np.float32)
        codes = self._bits(f"{weight}.nested_quant_map")[absmax]
        scales = np.repeat(self._bits(f"{weight}.nested_absmax"), meta["nested_blocksize"])[: codes.size]
        found: Floats = codes * scales + np.float32(meta["nested_offset"])
        return found

    def _bits(self, name: str) -> shards.Bits:
        return shards.bits(self._entry(name))

    def _entry(self, name: str) -> shards.Entry:
        if name not in self._entries:
            raise ModelError(f"{name}: not in this NF4 state; delete it, the next run makes it again")
        return self._entries[name]


def _pairs(codes: shards.Bits) -> Floats:
    """[256, 2]: both weights of every byte, high half first."""
    return np.stack([np.repeat(codes, 16), np.tile(codes, 16)], axis=1).astype(np.float32)


def _rounded(values: Floats, dtype: str) -> Floats:
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    return shards.widened(shards.narrowed(values)) if dtype == "bfloat16" else values


# --- making it


def _target(model: Model, cache_dir: Path) -> Path:
    local = not hub.is_hub_id(model.name) and Path(model.name).expanduser().is_dir()
    name = str(Path(model.name).expanduser().resolve()) if local else model.name
    alias = cache.key(name=name, revision=model.revision, dtype=model.dtype, double_quant=model.double_quant)
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(name).name)[:40]
    return cache_dir / "nf4" / f"{readable}-{model.dtype}-{alias[:12]}"


def _key(model: Model, source: dict[str, str]) -> str:
    return cache.key(version=VERSION, dtype=model.dtype, double_quant=model.double_quant, source=source)


def _build(model: Model, cache_dir: Path, target: Path) -> None:
    started = time.monotonic()
    source = hub.weights(model, cache_dir)
    identity = hub.identity(model, cache_dir)
    size = gemma3.read(source / "config.json")
    _refuse_quantised(source)
    entries = _text_entries(source, size)
    cache.need_room(cache_dir, _predicted_bytes(size), "the NF4 state")
    with cache.building(target, RECORD, _key(model, identity)) as draft:
        (draft.path / "config.json").write_text(json.dumps(_config(size, model), indent=2) + "\n", encoding="utf-8")
        _tokenizer_files(source, draft.path)
        _stream(model, size, entries, draft.path)
        draft.notes.update(
            name=model.name,
            revision=hub.revision(model, cache_dir),
            source=identity,
            read_bytes=sum(entry.num_bytes for entry in entries.values()),
            skipped_bytes=sum(entry.num_bytes for name, entry in shards.tensors(source).items() if gemma3.text_name(name) is None),
            parts=model_parts(draft.path),
            device=model.device,
            wall_s=time.monotonic() - started,
        )


def _predicted_bytes(size: gemma3.Size) -> int:
    """Two weights a byte and less than a tenth of that for scales, and the rest in 16 bits."""
    return int(0.55 * size.num_linear_parameters) + 2 * (size.num_parameters - size.num_linear_parameters)


def _refuse_quantised(source: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise ModelError(
            f"{source / 'config.json'}: the model is quantised already; take the 16-bit one (a name without -bnb-4bit, -GPTQ and the like)"
        )


def _text_entries(source: Path, size: gemma3.Size) -> dict[str, shards.Entry]:
    """The text model's tensors by their text-only names, each with the shape that config.json asks for.

    Raises:
        ModelError: missing or misshapen tensors, the first ten of them.
    """
    found = {text: entry for name, entry in shards.tensors(source).items() if (text := gemma3.text_name(name)) is not None}
    wanted = size.tensors()
    problems = [f"{source}: no tensor {name}" for name in wanted if name not in found]
    problems += [
        f"{found[name].path}: {name} is {list(found[name].shape)}, config.json asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"{found[name].path}: {name} is {found[name].dtype}; take the 16-bit model"
        for name in wanted
        if name in found and found[name].dtype not in ("BF16", "F16", "F32")
    ]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ModelError(*problems[:_SHOWN], *more, "weights and config.json do not belong together; download the model again")
    return {name: found[name] for name in wanted}


def _stream(model: Model, size: gemma3.Size, entries: dict[str, shards.Entry], directory: Path) -> None:
    """Read each tensor once, quantise the matrices, write. One tensor is in memory at a time."""
    linears = {gemma3.linear_name(layer, name) for layer in range(size.num_layers) for name in size.linears()}
    writer = shards.Writer(directory, _SHARD_BYTES)
    try:
        with progress.task("base weights to NF4", size.num_parameters / 1e6, "M weights") as task:
            for name, entry in entries.items():
                if name in linears:
                    for key, value in _quantised(name, entry, model).items():
                        writer.add(key, _NAMES[str(value.dtype)], tuple(value.shape), value.cpu().numpy())
                else:
                    writer.add(name, entry.dtype, entry.shape, shards.bits(entry))
                task.advance(math.prod(entry.shape) / 1e6)
        writer.finish()
    finally:
        writer.abandon()


_NAMES = {"torch.uint8": "U8", "torch.float32": "F32"}


def _quantised(name: str, entry: shards.Entry, model: Model) -> dict[str, torch.Tensor]:
    """A matrix as the tensors that bitsandbytes' Linear4bit saves."""
    from bitsandbytes.functional import quantize_4bit

    values = _values(entry, model)
    packed, state = quantize_4bit(values, blocksize=BLOCK, compress_statistics=model.double_quant, quant_type="nf4")
    if not bool(values.isfinite().all()):
        raise ModelError(
            f"{entry.path}: {name} has values that are not finite in {model.dtype}; download the model again, or set model.dtype"
        )
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def _values(entry: shards.Entry, model: Model) -> torch.Tensor:
    """A tensor in the arithmetic's dtype on the device that quantises it."""
    import torch

    if model.device == "cuda" and not torch.cuda.is_available():
        remedy = "without one: --preset gemma3-270m-cpu, or model.device=cpu, model.backend=transformers, model.dtype=float32"
        raise MachineError(f"model.device=cuda: torch sees no CUDA card here; {remedy}")
    raw = np.array(shards.bits(entry))
    there = torch.from_numpy(raw.view(np.int16) if entry.dtype == "BF16" else raw).to(model.device)
    return (there.view(torch.bfloat16) if entry.dtype == "BF16" else there).to(getattr(torch, model.dtype))


def _config(size: gemma3.Size, model: Model) -> dict[str, Any]:
    return size.to_config(model.dtype) | {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": model.double_quant,
            "bnb_4bit_compute_dtype": model.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
        }
    }


def _tokenizer_files(source: Path, directory: Path) -> None:
    (directory / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    text = json.dumps(random_weights.TOKENIZER_CONFIG, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


# --- the 8-bit optimizer


def adamw8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW with 8-bit state (arXiv 2110.02861); a group with "optim_bits": 32 keeps its state in 32 bit."""
    from bitsandbytes.optim import AdamW8bit

    class AdamW(AdamW8bit):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("optim_bits", config["optim_bits"])}

    made: torch.optim.Optimizer = AdamW(groups)
    return made
