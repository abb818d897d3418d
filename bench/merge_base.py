"""Which base is better to merge onto: the one that training saw, dequantised from NF4, or the original 16-bit weights?

Writes two q4_k_m GGUFs of a finished run (`python -m bench.merge_base --preset gemma3-270m-cpu`) and measures both against what
evaluate left of the tuned model. On the 16-bit base DoRA's norms are computed anew from it, as others merge.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from bench import rows
from trainer import shards
from trainer.backends import bitsandbytes, hub, llamacpp
from trainer.config import Config, load
from trainer.gemma3 import EMBEDDING, linear_name, text_name
from trainer.gguf import merge, modelfile, write
from trainer.stages import verify
from trainer.stages.export import Base


class Sixteen:
    """The original weights."""

    def __init__(self, directory: Path) -> None:
        self._entries = {text: entry for name, entry in shards.tensors(directory).items() if (text := text_name(name))}

    def linear(self, layer: int, name: str) -> Any:
        return shards.floats(self._entries[linear_name(layer, name)])

    def tensor(self, name: str) -> Any:
        return shards.floats(self._entries[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma3-270m-cpu")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    arguments = parser.parse_args()
    cfg = load(arguments.preset, arguments.set)
    state = bitsandbytes.nf4_state(cfg.model, cfg.paths.cache)
    weights = bitsandbytes.Nf4Weights(state)
    bases = {
        "nf4": Base(weights, shards.tensors(state)[EMBEDDING]),
        "16 bit": Sixteen(hub.weights(cfg.model, cfg.paths.cache)),
    }
    for name, base in bases.items():
        found = measure(cfg, weights, base, state / "tokenizer.json")
        metrics = {"kl_nats": found.kl_nats, "top1_agreement": found.top1, "num_positions": found.num_positions}
        print(rows.append("merge_base", "ours", {"preset": arguments.preset, "base": name}, metrics))


def measure(cfg: Config, weights: bitsandbytes.Nf4Weights, base: Any, tokenizer_json: Path) -> verify.Compared:
    adapter = merge.read(cfg.run_dir / "train" / ("best" if cfg.export.checkpoint == "best" else "adapter"), weights.size)
    threads = len(os.sched_getaffinity(0))
    asked = verify.read_answers(cfg.run_dir / "evaluate" / "answers.jsonl")
    reference = verify.read_reference(cfg.run_dir / "evaluate" / "reference" / "logprobs.npz", asked)
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "merged.gguf"
        write.write(
            gguf,
            weights.size,
            base,
            adapter,
            tokenizer_json,
            name="merge-base",
            chat_template=modelfile.CHAT_TEMPLATE,
            quantization=cfg.export.quantization,
            quantize=llamacpp.quantizer(),
            threads=threads,
            advance=lambda n: None,
        )
        with llamacpp.Engine(gguf, num_ctx=cfg.export.num_ctx, threads=threads) as engine:
            return verify.compare(engine, asked, reference, verify.Clock(3600.0))


if __name__ == "__main__":
    main()
