"""The release manifest's strict writer. Its tolerant twin is server/manifest.py; tests/contract/ holds the golden file
that both sides read. It is the only thing that crosses from trainer to server.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from trainer.config import Sampling, Section


class File(Section):
    path: str
    """Relative to the manifest's directory."""
    num_bytes: int
    sha256: str


class Base(Section):
    name: str
    revision: str
    weights_sha256: str
    """Hash over the base weights as NF4, so that the same name with other bytes is seen."""


class AsTrained(Section):
    key: str
    rank: int
    alpha: float
    dora: bool
    rslora: bool
    max_tokens: int
    rungs: tuple[str, ...]


class Rewrite(Section):
    """One literal replacement in user, system and assistant text before rendering, so that text cannot forge turns."""

    old: str
    new: str


class Prompt(Section):
    template: str
    """Ollama's TEMPLATE, in Go's template language."""
    stop: tuple[str, ...]
    num_ctx: int
    sampling: Sampling
    rewrite: tuple[Rewrite, ...]
    """Applied in order to every message's text, then `strip`."""
    strip: tuple[Literal["system", "user", "assistant"], ...]
    """Roles whose text is trimmed of white space as HF's template does; an empty system message is dropped."""


class Scores(Section):
    num_records: int
    loss_base: float
    loss_tuned: float
    exact_match_base: float | None
    exact_match_tuned: float | None
    exact_match_served: float | None


class Waived(Section):
    link: str
    message: str


class Parity(Section):
    verified: bool
    num_prompts: int
    ids_equal: float
    num_positions: int
    kl_nats: float
    top1_agreement: float
    max_kl_nats: float
    min_top1: float
    waived: tuple[Waived, ...]


class Licence(Section):
    applies_to: Literal["base", "trainer"]
    name: str
    notice: str
    url: str


class Manifest(Section):
    schema_version: Literal[1]
    name: str
    release: str
    created: datetime
    trainer_version: str
    base: Base
    adapter: AsTrained
    quantization: str
    files: Mapping[Literal["gguf", "modelfile", "probes"], File]
    prompt: Prompt
    scores: Scores
    parity: Parity
    licences: tuple[Licence, ...]


class Message(Section):
    role: Literal["system", "user", "assistant"]
    content: str


class Probe(Section):
    """A line of probes.jsonl: what the embedded engine rendered, tokenized and answered (greedy)."""

    messages: tuple[Message, ...]
    prompt: str
    """Rendered, without <bos>."""
    prompt_ids: tuple[int, ...]
    """With <bos>."""
    answer: str
