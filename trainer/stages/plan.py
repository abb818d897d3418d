"""Says before anything is downloaded whether a run fits, term by term, and what to change if it does not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from trainer import gemma3, progress
from trainer.artifacts import Inputs
from trainer.config import Config, Model
from trainer.errors import DoesNotFitError, ModelError
from trainer.facts import PlanFacts
from trainer.gemma3 import Size
from trainer.planner import cards, remedy, roofline
from trainer.planner.budget import Budget, budget
from trainer.planner.remedy import Remedy

VERSION = 1

EMBEDDED_BYTES = 253_000_000
"""The package that carries Gemma 3 270M."""
VISION_BYTES = 804 * 2**20
"""Vision tower and projector of the multimodal sizes: downloaded with the shards, never loaded."""
BAR_WIDTH = 28


def sources(cfg: Config) -> Mapping[str, Path]:
    config_json = Path(cfg.model.name) / "config.json"
    return {"model": config_json} if config_json.is_file() else {}


def run(cfg: Config, inputs: Inputs, out: Path) -> PlanFacts:
    """Print the table, write plan.json.

    Raises:
        ModelError: nobody can say how large the model is without asking the network.
        DoesNotFitError: it does not; plan.json is written all the same.
    """
    size = model_size(cfg.model)
    found = budget(cfg, size)
    name, available = place(cfg)
    facts = PlanFacts(
        fits=found.needed_bytes <= available,
        card=name,
        needed_bytes=found.needed_bytes,
        available_bytes=available,
        terms=dict(found.terms),
        num_parameters=size.num_parameters,
        download_bytes=download_bytes(cfg.model, size),
    )
    ways = [] if facts.fits else remedy.remedies(cfg, size, available)
    _write(out / "plan.json", facts, found, ways)
    progress.say(table(cfg, facts, found))
    if cfg.model.device == "cuda":
        generating = progress.duration(roofline.generation_s(cfg, size, cards.card(cfg.plan)))
        progress.say(f"evaluate generates for up to {generating} on such a card (evaluate.max_records, exact_match, max_new_tokens)")
    if not facts.fits:
        raise DoesNotFitError(*refusal(facts, found, ways))
    progress.say(f"fits: {_gb(available - facts.needed_bytes)} of {_gb(available)} stay free")
    return facts


def model_size(model: Model) -> Size:
    """The size behind model.name, from its directory's config.json or from the name alone.

    Raises:
        ModelError: a directory without a usable config.json, or a name that does not say its size.
    """
    if Path(model.name).is_dir():
        return gemma3.read(Path(model.name) / "config.json")
    known = re.search(r"gemma-3-(270m|1b|4b|12b|27b)\b", model.name.lower())
    if known:
        return gemma3.SIZES[known[1]]
    if model.name == "random:tiny":
        return gemma3.SIZES["tiny"]
    raise ModelError(
        f"model.name = {model.name!r}: neither a directory nor a name that says its size; "
        "take a name with gemma-3-270m, -1b, -4b, -12b or -27b in it, or download the model and name its directory"
    )


def download_bytes(model: Model, size: Size) -> int:
    """What a first run downloads: 16-bit shards from the hub, with the vision tower where there is one."""
    if model.name.startswith("embedded:"):
        return EMBEDDED_BYTES
    if model.name.startswith("random:") or Path(model.name).is_dir():
        return 0
    has_vision = size.hidden_size >= gemma3.SIZES["4b"].hidden_size
    return 2 * size.num_parameters + (VISION_BYTES if has_vision else 0)


def place(cfg: Config) -> tuple[str, int]:
    """Where it runs and how many bytes there are: the card of the plan, or this machine."""
    if cfg.model.device == "cuda":
        card = cards.card(cfg.plan)
        return card.name, card.memory_bytes
    return "machine's memory", host_bytes(Path("/sys/fs/cgroup/memory.max"))


def host_bytes(cgroup_limit: Path) -> int:
    """Memory of this machine, or of the container if its limit (cgroup v2) is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_limit.read_text(encoding="ascii").strip() if cgroup_limit.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


def table(cfg: Config, facts: PlanFacts, found: Budget) -> str:
    """The terms with a bar each, the largest filling it."""
    largest = max(found.terms.values())
    about = f"{cfg.model.name}, {_count(facts.num_parameters)} parameters, {cfg.data.max_tokens} tokens, rank {cfg.adapter.rank}"
    kind = "DoRA" if cfg.adapter.dora else "LoRA"
    download = f"the first run downloads {_gb(facts.download_bytes)}" if facts.download_bytes else "nothing to download"
    lines = [f"{about}, {kind}, {cfg.train.optimizer}, {cfg.model.dtype}", f"{download}\n"]
    for name, num_bytes in found.terms.items():
        bar = "█" * round(BAR_WIDTH * num_bytes / largest) or "▏"
        lines.append(f"  {name:<30}{_gb(num_bytes):>10}  {bar}")
    lines.append(f"  {'needed at the peak (' + found.moment + ')':<30}{_gb(facts.needed_bytes):>10}")
    lines.append(f"  {'the ' + facts.card + ' has':<30}{_gb(facts.available_bytes):>10}\n")
    return "\n".join(lines)


def refusal(facts: PlanFacts, found: Budget, ways: list[Remedy]) -> list[str]:
    """Why not, and which changes do fit."""
    term, num_bytes = remedy.largest_movable(found)
    missing_bytes = facts.needed_bytes - facts.available_bytes
    missing = f"needs {_gb(facts.needed_bytes)}, the {facts.card} has {_gb(facts.available_bytes)}, {_gb(missing_bytes)} are missing"
    movable = f"the largest part that a setting moves is {term}, {_gb(num_bytes)} ({remedy.MOVES[term]})"
    lines = [f"does not fit: {missing}; {movable}"]
    lines += [f"  --set {way.setting:<30} needs {_gb(way.needed_bytes)}; costs: {way.cost}" for way in ways]
    return (
        lines
        if ways
        else [*lines, "  no single setting makes it fit: lower data.max_tokens and adapter.rank together, or take a smaller model"]
    )


def _write(path: Path, facts: PlanFacts, found: Budget, ways: list[Remedy]) -> None:
    tree = facts.model_dump() | {"moment": found.moment, "other_moments": dict(found.aside), "remedies": [way._asdict() for way in ways]}
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _count(num: int) -> str:
    return f"{num / 1e9:.1f} billion" if num >= 1e9 else f"{num / 1e6:.0f} million"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
