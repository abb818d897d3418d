"""What each stage measured: one frozen model a stage, kept in its artifact.json and read by later stages and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    """Frozen and closed; fields are what was measured, with units in the names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PlanFacts(Facts):
    fits: bool
    card: str
    needed_bytes: int
    available_bytes: int
    terms: dict[str, int]
    """Bytes a term; their sum is needed_bytes."""
    num_parameters: int
    download_bytes: int
    pinned_bytes: int = 0
    """Pinned memory of the host, beside needed_bytes."""


class PrepareFacts(Facts):
    source_format: str
    num_train: int
    num_valid: int
    num_train_tokens: int
    num_supervised_tokens: int
    num_valid_tokens: int
    longest_tokens: int
    num_shortened: int
    """Records that lost their oldest turns to fit data.max_tokens."""
    num_left_out: int
    """Records that were too long even so."""
    num_duplicates: int
    num_rows_packed: int
    """Rows that first-fit packing makes of the train records at data.max_tokens."""
    pack_fill: float
    """Share of those rows that is tokens, 0..1."""


class LossPoint(Facts):
    step: int
    loss: float
    """Mean over supervised tokens, nats."""


class TrainFacts(Facts):
    """As trained: after train nobody reads cfg.adapter or cfg.train, only this and adapter_config.json."""

    backend: str
    device: str
    rank: int
    alpha: float
    dora: bool
    rslora: bool
    max_tokens: int
    rungs: tuple[str, ...] = ()
    packed: bool
    steps: int
    accumulation: int
    num_tokens: int
    """Tokens seen, padding not counted."""
    wall_s: float
    tokens_per_s: float
    peak_bytes: int
    """torch's max_memory_allocated on CUDA, VmHWM on a CPU."""
    train_loss: tuple[LossPoint, ...]
    valid_loss: tuple[LossPoint, ...]
    best_step: int
    kernels: tuple[str, ...] = ()
    """Kernels of ours that were active."""
    pinned_bytes: int = 0
    """Host memory that was pinned for layer inputs, kept outputs and gradients."""
    base_sha256: str = ""
    """Hash of the NF4 state that was trained on: evaluate and export refuse another one under the same name."""


class Answer(Facts):
    """The last question of one held-out record with what was expected and what was said, for the report."""

    prompt: str
    expected: str
    base: str
    tuned: str


class EvaluateFacts(Facts):
    num_records: int
    loss_base: float
    loss_tuned: float
    exact_match_base: float | None
    exact_match_tuned: float | None
    """0..1 of the num_records; None where the preset does not generate."""
    num_reference: int
    num_held_out: int
    answers: tuple[Answer, ...]
    wall_s: float


class ExportFacts(Facts):
    quantization: str
    gguf: str
    """File name of the GGUF inside the stage's directory; `Modelfile` lies beside it."""
    gguf_bytes: int
    gguf_sha256: str
    num_tensors: int
    types: dict[str, int]
    """Tensors a GGUF type."""
    checkpoint_step: int
    wall_s: float
    peak_rss_bytes: int
    base_sha256: str = ""
    """Hash over the base's NF4 state that was merged."""
    base_revision: str = ""


class Refusal(Facts):
    link: Literal["hash", "tokens", "stop", "kl", "top1"]
    message: str


class VerifyFacts(Facts):
    num_prompts: int
    """Prompts whose token ids were compared with HF's."""
    ids_equal: float
    """Share that were equal, 0..1; less than 1 refuses."""
    num_positions: int
    kl_nats: float
    """Mean KL(tuned || served) over the positions."""
    top1_agreement: float
    max_kl_nats: float
    min_top1: float
    ends: float
    """Share of greedy answers that ended by themselves."""
    num_answers: int
    exact_match_served: float | None
    served_answers: tuple[str, ...]
    """The GGUF's answers to the prompts of EvaluateFacts.answers, in that order."""
    verified: bool
    waived: tuple[Refusal, ...] = ()
    wall_s: float


class ReleaseFacts(Facts):
    release: str
    directory: Path
    manifest_sha256: str


class ReportFacts(Facts):
    html_bytes: int
