"""The ladder: what a training gives up when memory runs out, one rung at a time. Pure but for attempt.json.

First what costs no quality, then the context, the rank and DoRA, each once. A rung changes an Attempt, never the Config of the
run nor its key: the adapter is what the same command made, and what it was made with stands in the facts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from trainer.artifacts import write_whole
from trainer.config import Config

ATTEMPT = "attempt.json"
"""In the train's directory, beside the checkpoints that were made under it."""
EXPANDABLE = "expandable_segments:True"
"""torch's allocator then leaves no holes between segments that count against a card (PYTORCH_ALLOC_CONF)."""
MOST_LOST = 0.01
"""Share of records, or of supervised tokens, that a shorter context may cost without policy "lossy"."""

Setting = bool | int | str
Settings = Mapping[str, Setting]


class Attempt(BaseModel):
    """What is in force instead of the config's own values, and how it came to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Setting] = {}
    """By dotted name, as after --set."""
    allocator: str = ""
    """PYTORCH_ALLOC_CONF of the worker; empty leaves it as it is."""
    rungs: tuple[str, ...] = ()
    """One sentence a rung that was climbed: what changed and what it cost."""

    def in_force(self, cfg: Config) -> Config:
        for dotted, value in self.settings.items():
            section, key = dotted.split(".")
            cfg = cfg.model_copy(update={section: getattr(cfg, section).model_copy(update={key: value})})
        return cfg


class Rung(NamedTuple):
    """change: settings from the config in force, {} where nothing is left; cost: what one gives up for it."""

    change: Callable[[Config], Settings]
    cost: str
    quality: bool = False
    """Whether the adapter gets worse by it."""
    anew: bool = False
    """Whether checkpoints are of no use afterwards."""


class Step(NamedTuple):
    """The next attempt, and the rung that leads to it."""

    attempt: Attempt
    settings: Settings
    change: str
    rung: Rung


class Lost(NamedTuple):
    """What a shorter context costs: records that no longer fit, and how many supervised tokens go with them."""

    num_records: int
    num_shortened: int
    num_left_out: int
    num_tokens: int
    num_tokens_lost: int

    @property
    def share(self) -> float:
        """0..1, of records or of supervised tokens, whichever is worse."""
        records = (self.num_shortened + self.num_left_out) / max(1, self.num_records)
        return max(records, self.num_tokens_lost / max(1, self.num_tokens))

    def __str__(self) -> str:
        return (
            f"{self.num_shortened} of {self.num_records} records lose their oldest turns, {self.num_left_out} are left out, "
            f"with {self.num_tokens_lost} of {self.num_tokens} supervised tokens"
        )


def climb(cfg: Config, attempt: Attempt, allocator: str) -> Step | None:
    """The next rung from the attempt; None where the ladder ends. allocator: PYTORCH_ALLOC_CONF that was in force."""
    if cfg.model.device == "cuda" and not attempt.allocator and EXPANDABLE not in allocator:
        wanted = ",".join(filter(None, (allocator, EXPANDABLE)))
        return _step(attempt, {}, Rung(lambda _: {}, "nothing"), wanted, f"PYTORCH_ALLOC_CONF -> {wanted}")
    now = attempt.in_force(cfg)
    for rung in RUNGS:
        settings = rung.change(now)
        if settings and not settings.keys() & attempt.settings.keys():  # each setting moves once
            before = {name: getattr(getattr(now, name.split(".")[0]), name.split(".")[1]) for name in settings}
            changes = ", ".join(f"{name} {_shown(before[name])} -> {_shown(value)}" for name, value in settings.items())
            return _step(attempt, settings, rung, attempt.allocator, changes)
    return None


def _step(attempt: Attempt, settings: Settings, rung: Rung, allocator: str, change: str) -> Step:
    after = Attempt(settings={**attempt.settings, **settings}, allocator=allocator, rungs=(*attempt.rungs, f"{change}; costs: {rung.cost}"))
    return Step(after, settings, change, rung)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def told(step: Step, more: str) -> Attempt:
    """The step's attempt with what was counted beside its last rung."""
    *earlier, last = step.attempt.rungs
    return step.attempt.model_copy(update={"rungs": (*earlier, f"{last}: {more}")})


def read(train: Path) -> Attempt:
    """The attempt that the directory's checkpoints belong to: the config as it is where none was written."""
    file = train / ATTEMPT
    return Attempt.model_validate_json(file.read_bytes()) if file.is_file() else Attempt()


def write(train: Path, step: Step, attempt: Attempt) -> None:
    """Make the attempt the directory's. What an adapter of another shape left goes first: a crash in between only starts over."""
    if step.rung.anew:
        for name in ("checkpoints", "best", "best.old", "adapter", "adapter.old"):
            shutil.rmtree(train / name, ignore_errors=True)
        (train / "metrics.jsonl").unlink(missing_ok=True)
    write_whole(train / ATTEMPT, attempt.model_dump_json().encode())


def _our_layer(cfg: Config) -> Settings:
    possible = cfg.model.backend == "unsloth" and cfg.kernels.layer == "stock" and cfg.kernels.dora == "ours" and not cfg.adapter.dropout
    return {"kernels.layer": "ours"} if possible else {}


def _chunked_loss(cfg: Config) -> Settings:
    return {"kernels.loss": "ours"} if cfg.kernels.loss == "stock" else {}


def _offload(cfg: Config) -> Settings:
    return {"kernels.offload": "ours"} if _on_card(cfg) and cfg.kernels.offload == "stock" else {}


def _keep_less(cfg: Config) -> Settings:
    return {"kernels.keep_bytes": 0} if cfg.kernels.layer == "ours" and cfg.kernels.keep_bytes else {}


def _recompute(cfg: Config) -> Settings:
    needed = cfg.kernels.layer == "stock" and not cfg.train.gradient_checkpointing
    return {"train.gradient_checkpointing": True} if needed else {}


def _one_row(cfg: Config) -> Settings:
    return {"train.batch_records": 1} if cfg.train.batch_records > 1 else {}


def _smaller_tile(cfg: Config) -> Settings:
    return {"kernels.mlp_tile_tokens": 1024} if cfg.kernels.layer == "ours" and cfg.kernels.mlp_tile_tokens > 1024 else {}


def _pin_gradients(cfg: Config) -> Settings:
    return {"kernels.pin_gradients": True} if _on_card(cfg) and not cfg.kernels.pin_gradients else {}


def _two_layers(cfg: Config) -> Settings:
    """Layer inputs that wait on the host cost the card nothing: then two layers at a time would only need more of it."""
    stay = cfg.kernels.layer == "ours" and not (_on_card(cfg) and cfg.kernels.offload == "ours")
    return {"kernels.span_layers": 2} if stay and cfg.kernels.span_layers == 1 else {}


def _pin_less(cfg: Config) -> Settings:
    return {"kernels.keep_pinned_bytes": 0} if cfg.kernels.layer == "ours" and cfg.kernels.keep_pinned_bytes else {}


def _half_context(cfg: Config) -> Settings:
    return {"data.max_tokens": cfg.data.max_tokens // 2} if cfg.data.max_tokens >= 64 else {}


def _half_rank(cfg: Config) -> Settings:
    return {"adapter.rank": cfg.adapter.rank // 2} if cfg.adapter.rank > 1 else {}


def _no_dora(cfg: Config) -> Settings:
    return {"adapter.dora": False} if cfg.adapter.dora else {}


def _on_card(cfg: Config) -> bool:
    return cfg.model.device == "cuda" and cfg.kernels.layer == "ours"


RUNGS: tuple[Rung, ...] = (
    Rung(_our_layer, "nothing"),
    Rung(_chunked_loss, "nothing"),
    Rung(_offload, "nothing but pinned memory of the host"),
    Rung(_keep_less, "some speed, more is computed again"),
    Rung(_recompute, "a third more arithmetic"),
    Rung(_one_row, "some speed, a step sees as many tokens"),
    Rung(_smaller_tile, "some speed, each tile dequantises again"),
    Rung(_pin_gradients, "some speed, and pinned memory of the host"),
    Rung(_two_layers, "a sixth more arithmetic"),
    Rung(_pin_less, "some speed, more is computed again"),
    Rung(_half_context, "what is longer is cut, a step sees as many tokens", quality=True),
    Rung(_half_rank, "a smaller adapter learns less, and it starts anew", quality=True, anew=True),
    Rung(_no_dora, "DoRA's gain in quality, and the adapter starts anew", quality=True, anew=True),
)
"""From the top: what costs no quality, then what does."""
