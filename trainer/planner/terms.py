"""What each term of a budget is: the group it belongs to, its formula and where that comes from. plan.json carries all of it.

Early recipes for a T4 speak of three groups, and so does the table: weights, gradients and optimizer, context.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Group = Literal["weights", "gradients and optimizer", "context"]

CLAIM: Mapping[Group, int] = MappingProxyType(
    {"weights": 7_600_000_000, "gradients and optimizer": 5_500_000_000, "context": 2_500_000_000}
)
"""What early recipes claim for a 12B at rank 64 on a T4, bytes: 15.6 GB in all."""


class Term(NamedTuple):
    """formula: in the legend of standing.py, bytes. source: a paper, a file of this house, or a measurement."""

    group: Group
    formula: str
    source: str


_QLORA = "QLoRA, arXiv 2305.14314, section 3"
_LAYER = "trainer/kernels/layer.py: backward of one layer"
_STOCK = "shapes of transformers' Gemma 3 layer; measured peaks in tests/trainer/planner/test_budget.py"
_ADAM = "optimizer state"

TERMS: Mapping[str, Term] = MappingProxyType(
    {
        "weights, NF4 codes": Term("weights", "L sum(in out) / 2", _QLORA),
        "weights, block scales": Term("weights", "1 a block of 64 and 4 a 256 of them; 4 a block with model.double_quant = false", _QLORA),
        "embedding": Term("weights", "b V h, the head is tied to it", "arXiv 2503.19786, table 1"),
        "norms": Term("weights", "4 (L (4 h + 2 head_dim) + h)", "trainer/gemma3.py: Size.norms"),
        "adapter": Term(
            "gradients and optimizer", "4 L (sum(r (in + out)) + sum(out)), float32; sum(out) with DoRA", "arXiv 2402.09353, section 4"
        ),
        "gradients": Term(
            "gradients and optimizer",
            "4 a trained value, of the layers gone through; of all and of one layer more with several passes a step; of two layers where they are pinned",
            "trainer/kernels/stack.py",
        ),
        "gradients, back for the step": Term("gradients and optimizer", "4 a trained value", "trainer/kernels/stack.py: Gradients.gather"),
        _ADAM: Term(
            "gradients and optimizer",
            "2 a value and 8 a 256 values of A and B, 8 a magnitude (adamw8bit); 8 a value (adamw32)",
            "bitsandbytes' AdamW8bit; arXiv 2110.02861",
        ),
        "norm caches": Term("gradients and optimizer", "12 a magnitude: n, |W|^2, g", "trainer/kernels/dora.py"),
        "layer inputs": Term("context", "4 T h a span not yet gone through", "trainer/kernels/offload.py, offload switched off"),
        "kept tensors": Term("context", "outputs within kernels.keep_bytes, of the layers not yet gone through", "trainer/planner/keep.py"),
        "kept tensors, back": Term("context", "down's, o's and gate_up's of one layer, from pinned memory", "trainer/kernels/offload.py"),
        "residuals": Term("context", "12 T h: x, x1, dx in float32; 4 T h for each further layer of a span", _LAYER),
        "attention's half": Term("context", "T (b (2 h + 2 (q + 2 kv) + q) + 4 heads)", _LAYER),
        "rest": Term("context", "175 MB and 3,750 a token", "fitted on 4,096 and 24,576 tokens on an H100: planner/ours.py"),
        "MLP input": Term("context", "b T h", _LAYER),
        "MLP tile": Term("context", "b t (3 i + 2 h)", _LAYER),
        "dequantised weights": Term("context", "3 b h i: gate, up and down of one layer", _LAYER),
        "attention tensors": Term("context", "T (3 b q + 8 kv)", "trainer/kernels/attention.py: backward"),
        "attention scores": Term(
            "context",
            "at most 256 MiB of S, P, dP, dS (12 a score); with stock attention up to 16 heads T T",
            "trainer/kernels/attention.py; torch's MATH kernel",
        ),
        "layer input, on its way": Term("context", "2 T h", "trainer/kernels/offload.py: Waiting.ahead"),
        "logits and loss": Term(
            "context", "(2 b + 4) T h and 8 V for each of 128 rows; all T rows with kernels.loss = stock", "trainer/kernels/loss.py"
        ),
        "checkpoints": Term("context", "T h a layer, one where unsloth moves them to the host", _STOCK),
        "layer in recompute": Term("context", "what one layer keeps, its largest weight in 16 bit, and gradients", _STOCK),
        "the other layers' activations": Term("context", "what L - 1 layers keep, without checkpointing", _STOCK),
        "DoRA's norms in PEFT": Term("context", "max over linears of 4 in in + 18 in out", "peft 0.21: lora/dora.py"),
        "allocator's slack": Term(
            "context",
            "20 MB, 0.71 of the residuals, 0.125 of the kept tensors; with stock layers 0.43 of the moment",
            "fitted on three rows of bench/results/qdora_step.jsonl, tested on four: tests/trainer/planner/test_ours.py",
        ),
        "CUDA context": Term("context", "228 MB", "a T4's 15,095 MiB less the 15.6e9 bytes that a process was seen to get"),
        "Python and its libraries": Term("context", "900 MB", "measured: torch, transformers and PEFT imported on a CPU"),
    }
)


def grouped(terms: Mapping[str, int]) -> dict[Group, int]:
    """Bytes a group; they sum to the terms' sum."""
    return {group: sum(num for name, num in terms.items() if TERMS[name].group == group) for group in CLAIM}


def explained(terms: Mapping[str, int]) -> list[dict[str, object]]:
    """Every term with its bytes, for plan.json."""
    return [{"term": name, "bytes": num, **TERMS[name]._asdict()} for name, num in terms.items()]
