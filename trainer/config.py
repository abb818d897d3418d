"""The one description of a run: a frozen, closed tree read from a TOML preset and `--set a.b=c` overrides.

TOML because it is typed and in the standard library (in YAML `2e-4` is a string). A key that does not exist, a wrong
type or a contradiction is a ConfigError that names it, and all of them are reported at once. Derived numbers are
properties, so that each formula stands in one place.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEVEN: tuple[Linear, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Section(BaseModel):
    """A part of the config: frozen, closed, documented by attribute docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Model(Section):
    name: str = "unsloth/gemma-3-12b-it"
    """A hub id, a directory in the hub's layout, `embedded:gemma-3-270m` (a package carries it) or `random:tiny`."""
    revision: str = ""
    """Hub commit to pin; empty takes the newest."""
    backend: Literal["unsloth", "transformers"] = "unsloth"
    """Who loads the model and makes the adapter. unsloth needs a CUDA card."""
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Arithmetic of everything that is not NF4. A T4 has no bfloat16."""
    double_quant: bool = True
    """Quantise NF4's block scales too: 0.4 bits a weight less."""

    @model_validator(mode="after")
    def _possible(self) -> Model:
        if self.backend == "unsloth" and self.device == "cpu":
            raise ValueError('backend = "unsloth" needs device = "cuda"; on a CPU take backend = "transformers"')
        if self.device == "cpu" and self.dtype == "float16":
            raise ValueError('float16 arithmetic is not for CPUs; take dtype = "float32"')
        return self


class Data(Section):
    path: Path = Path("data/dataset.json")
    """JSON or JSON Lines with your conversations: see data/README.md."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    max_tokens: int = Field(4096, ge=32)
    """Context of training: longer conversations lose their oldest whole turns, or are left out."""
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    """Part of the records held out, chosen by a hash of their prompt: the same record always lands on the same side."""


class Pack(Section):
    enabled: bool = False
    """Fill rows up to data.max_tokens with whole records. Only exact with an attention that honours boundaries."""


class Adapter(Section):
    rank: int = Field(64, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    dora: bool = True
    rslora: bool = True
    targets: tuple[Linear, ...] = Field(SEVEN, min_length=1)

    @property
    def scale(self) -> float:
        """Factor of BA: alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732, theorem 3.2), else alpha / rank."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Train(Section):
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(10, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Literal["adamw8bit", "adamw32"] = "adamw8bit"
    tokens_per_step: int = Field(16384, ge=1)
    """Tokens of one optimizer step, on average; gradient accumulation follows from it."""
    batch_records: int = Field(1, ge=1)
    """Records (or packed rows) of one forward pass."""
    epochs: float = Field(2.0, gt=0)
    max_steps: int = Field(0, ge=0)
    """Stop after so many optimizer steps; 0 goes by epochs."""
    gradient_checkpointing: bool = True
    valid_every: int = Field(50, ge=1)
    """Optimizer steps between two measurements of the validation loss."""
    valid_records: int = Field(64, ge=1)
    """Records of the bounded sample that the validation loss is measured on."""
    seed: int = 3407
    report_to: Literal["none", "tensorboard", "wandb"] = "none"


class Kernels(Section):
    """How a step is computed. "ours" that cannot be installed is an error; "stock" is what PEFT, transformers and torch bring."""

    layer: Literal["ours", "stock"] = "stock"
    """Our decoder layer in place of each `model.layers[i]`: float32 residual, recompute by hand, what follows inside it."""
    dora: Literal["ours", "stock"] = "ours"
    """DoRA with kept norms and a backward of its own; without `layer` at PEFT's seam, which unsloth's layers have not: with backend
    "unsloth" a stock layer is stock in all its parts, and the log says so."""
    attention: Literal["ours", "stock"] = "ours"
    norms: Literal["ours", "stock"] = "ours"
    """RMSNorm, rope and residual in fused kernels; "stock" is torch's operations one by one."""
    geglu: Literal["ours", "stock"] = "ours"
    loss: Literal["ours", "stock"] = "ours"
    """Chunked cross-entropy; "stock" holds all logits at once."""
    offload: Literal["ours", "stock"] = "ours"
    """Layer inputs wait for their recompute in pinned host memory; "stock" leaves them on the card."""
    keep_bytes: int = Field(0, ge=0)
    """Bytes of the card for outputs that spare their matrix product in the recompute; 0 recomputes all."""
    keep_pinned_bytes: int = Field(0, ge=0)
    """The same in pinned host memory, filled after keep_bytes."""
    mlp_tile_tokens: int = Field(4096, ge=128)
    """The MLP runs over so many tokens at a time."""
    span_layers: int = Field(1, ge=1, le=4)
    """Layers between two checkpoints: 2 halves their bytes for a sixth more arithmetic."""
    pin_gradients: bool = False
    """Adapter gradients move to pinned memory as each layer finishes, for long contexts."""


class Checkpoint(Section):
    every_steps: int = Field(50, ge=1)
    every_minutes: float = Field(15.0, gt=0)
    """Whichever comes first: a step may take a minute."""
    keep: int = Field(2, ge=1)
    mirror: Path | None = None
    """A directory that outlives the machine, a mounted Drive: the newest checkpoint is copied there, and taken up from there."""


class Oom(Section):
    """What happens when memory runs out while training."""

    policy: Literal["ladder", "stop", "lossy"] = "ladder"
    """"ladder" gives up speed, then context, rank and DoRA, one by one; "lossy" does so even where a shorter context costs more than 1 %
    of the records; "stop" gives up nothing."""
    stall_minutes: float = Field(30.0, gt=0)
    """Minutes without a finished step after which training counts as stuck; 20 steps where these take longer."""


class Evaluate(Section):
    max_records: int = Field(200, ge=1)
    """Held-out records that are measured; a sample by content hash where there are more."""
    exact_match: bool = False
    """Generate answers and count those equal to the record's: for tasks with one right answer."""
    max_new_tokens: int = Field(64, ge=1)
    batch_records: int = Field(8, ge=1)
    reference_records: int = Field(32, ge=3)
    """Held-out prompts whose answers and next-token distributions are kept for verify."""


class Sampling(Section):
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(64, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repeat_penalty: float = Field(1.0, gt=0)
    num_predict: int = Field(1024, ge=1)


class Export(Section):
    quantization: Literal["q4_k_m"] = "q4_k_m"
    checkpoint: Literal["best", "last"] = "best"
    """Which adapter is exported: the one with the lowest validation loss, or the last."""
    name: str = Field("trinity", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """The model's name at the serving engine."""
    num_ctx: int = Field(4096, ge=64)
    sampling: Sampling = Sampling()


class Verify(Section):
    kl: Literal["refuse", "warn"] = "refuse"
    """What a model over the limits below gets: no release, or one that is marked unverified."""
    max_kl_nats: float = Field(0.1, gt=0)
    """Limit of the mean KL divergence tuned || served over next-token distributions, nats."""
    min_top1: float = Field(0.9, gt=0, le=1)
    """Least share of positions where both have the same most likely token."""
    minutes: float = Field(10.0, gt=0)
    """Bound on the time of the comparison; a short probe sets the sample."""


class Run(Section):
    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Directory under output/runs; empty takes the preset's name."""
    fresh: bool = False
    """Set a train under another key aside instead of refusing."""


class Paths(Section):
    output: Path = Path("output")
    cache: Path = Path(".cache")
    """Base weights as NF4, tokenizers, compiled kernels: all of it can be made again."""


class Plan(Section):
    card: Literal["T4", "L4", "A10", "A100-40", "H100"] = "T4"
    vram_gb: float = Field(0.0, ge=0)
    """Memory of a card that has no name here, GB; 0 goes by the name."""


class Config(Section):
    model: Model = Model()
    data: Data = Data()
    pack: Pack = Pack()
    adapter: Adapter = Adapter()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    verify: Verify = Verify()
    # How, not what: never part of a key.
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    oom: Oom = Oom()
    run: Run = Run()
    paths: Paths = Paths()
    plan: Plan = Plan()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.evaluate.max_new_tokens >= self.export.num_ctx:
            raise ValueError("evaluate.max_new_tokens must be smaller than export.num_ctx")
        if self.export.num_ctx < self.data.max_tokens:
            raise ValueError("export.num_ctx is smaller than data.max_tokens: the served model would forget what it was trained to see")
        return self

    @property
    def run_dir(self) -> Path:
        return self.paths.output / "runs" / self.run.name


def presets() -> tuple[str, ...]:
    """Names of the presets that come with Trinity."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def load(preset: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset (a name, or the path of a .toml) and apply `a.b=c` overrides.

    Raises:
        ConfigError: unknown preset, broken TOML, unknown keys, wrong types, contradictions: all problems at once.
    """
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not path.is_file():
        raise ConfigError(f"no preset {preset!r}; there are: {', '.join(presets())}, or give the path of a .toml")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    problems = [problem for text in overrides if (problem := _override(tree, text))]
    tree = _with_run_name(tree, path.stem)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(item, path) for item in error.errors()]
    if problems:
        raise ConfigError(*problems)
    return config


def _with_run_name(tree: dict[str, Any], default: str) -> dict[str, Any]:
    run = tree.get("run", {})
    return {**tree, "run": {**run, "name": run.get("name") or default}} if isinstance(run, Mapping) else tree


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Put one `a.b=c` into the tree; returns the problem if the text is not of that form."""
    dotted, equals, value = text.partition("=")
    *parents, leaf = dotted.strip().split(".")
    if not equals or not parents or not all([*parents, leaf]):
        return f"--set {text}: write it as section.key=value, for example --set train.epochs=1"
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            return f"--set {text}: {name} is a value, not a section"
    tree[leaf] = _typed(value.strip())
    return None


def _typed(value: str) -> Any:
    """A TOML value where the text is one (numbers, true, lists, quoted), else the text itself, as a shell user expects."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _explain(item: Mapping[str, Any], path: Path) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: no such key{_known(item['loc'])}"
    if item["type"] == "value_error":
        return f"{where + ': ' if where else ''}{item['ctx']['error']}"
    return f"{where}: {item['msg']}, not {json.dumps(item['input'], default=str)} (from {path.name} or --set)"


def _known(loc: Sequence[Any]) -> str:
    """The keys that a section has, for the message about one that it has not."""
    section: type[BaseModel] = Config
    for part in loc[:-1]:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return ""
        section = field.annotation
    return f"; there are: {', '.join(section.model_fields)}"
