"""export: merge the trained adapter into its base and write the GGUF and its Modelfile.

The adapter says what it is (adapter_config.json); cfg.adapter and cfg.train are not read.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import progress, shards
from trainer.artifacts import Inputs
from trainer.config import Config
from trainer.errors import ArtifactError, MachineError
from trainer.facts import ExportFacts, TrainFacts
from trainer.gemma3 import EMBEDDING

if TYPE_CHECKING:
    from trainer.backends.bitsandbytes import Nf4Weights
    from trainer.gguf.merge import Array, Rows

VERSION = 1


def sources(cfg: Config) -> Mapping[str, Path]:
    return {}


def run(cfg: Config, inputs: Inputs, out: Path) -> ExportFacts:
    """Raises:
    ArtifactError: the adapter belongs to another base or cannot be merged.
    ModelError: the base weights are not those that were trained on.
    MachineError: no room on the disk, or llama.cpp's library is missing.
    """
    from trainer.backends import bitsandbytes, llamacpp
    from trainer.dataset import template
    from trainer.gguf import merge, modelfile, write

    started = time.monotonic()
    trained = inputs.facts(TrainFacts)
    state = bitsandbytes.nf4_state(cfg.model, cfg.paths.cache)
    bitsandbytes.require_same(state, trained.base_sha256)
    base = bitsandbytes.Nf4Weights(state)
    best = cfg.export.checkpoint == "best"
    folder = inputs.path("train") / ("best" if best else "adapter")
    adapter = merge.read(folder, base.size)
    _require_base(folder, cfg.model.name)
    _require_room(out, write.num_bytes(base.size, cfg.export.quantization))
    gguf = out / f"{cfg.export.name}-{cfg.export.quantization}.gguf"
    tensor_bytes = sum(item.num_bytes for item in write.plan(base.size, cfg.export.quantization))
    with progress.task("writing the GGUF", tensor_bytes / 1e6, "MB") as task, _full_disk(out):
        written = write.write(
            gguf,
            base.size,
            Base(base, shards.tensors(state)[EMBEDDING]),
            adapter,
            state / "tokenizer.json",
            name=cfg.export.name,
            chat_template=modelfile.CHAT_TEMPLATE,
            quantization=cfg.export.quantization,
            quantize=llamacpp.quantizer(),
            threads=len(os.sched_getaffinity(0)),
            advance=lambda n: task.advance(n / 1e6),
        )
        prompt = modelfile.prompt(cfg.export, template.REWRITE, template.STRIP)
        (out / "Modelfile").write_text(modelfile.modelfile(gguf.name, prompt), encoding="utf-8")
    return ExportFacts(
        quantization=cfg.export.quantization,
        gguf=gguf.name,
        gguf_bytes=written.num_bytes,
        gguf_sha256=written.sha256,
        num_tensors=sum(written.types.values()),
        types=written.types,
        checkpoint_step=trained.best_step if best else trained.steps,
        wall_s=time.monotonic() - started,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        base_sha256=base.sha256,
        base_revision=str(base.notes.get("revision", "")),
    )


class Base:
    """The NF4 state, but for the embedding: of its up to 4 GB in float32 only the rows at hand exist."""

    def __init__(self, weights: Nf4Weights, embedding: shards.Entry) -> None:
        self._weights, self._embedding = weights, embedding

    def linear(self, layer: int, name: str) -> Array:
        return self._weights.linear(layer, name)

    def tensor(self, name: str) -> Rows:
        return MappedRows(self._embedding) if name == EMBEDDING else self._weights.tensor(name)


class MappedRows:
    def __init__(self, entry: shards.Entry) -> None:
        self.shape = entry.shape
        self._bits = shards.bits(entry)
        self._widen = shards.widened if entry.dtype == "BF16" else lambda bits: bits.astype("<f4")

    def __getitem__(self, rows: slice) -> Array:
        return self._widen(self._bits[rows])


def _require_base(folder: Path, name: str) -> None:
    path = folder / "adapter_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if named != name:
        raise ArtifactError(f"{path}: the adapter belongs to {named!r}, not to {name!r}; set model.name to that base, or train again")


def _require_room(out: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(out).free
    if free < num_bytes:
        raise MachineError(
            f"{out}: the GGUF takes {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room, or take another disk: --set paths.output=DIR"
        )


@contextmanager
def _full_disk(out: Path) -> Iterator[None]:
    """Something else may fill the disk while the file is being written."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MachineError(
            f"{out}: the disk ran full while the GGUF was written; make room, or take another disk: --set paths.output=DIR"
        ) from error
