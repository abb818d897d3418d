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
from trainer.planner import cards, keep, ours, remedy, roofline
from trainer.planner.budget import Budget, budget
from trainer.planner.remedy import Remedy
from trainer.planner.standing import tokens

VERSION = 2

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
        pinned_bytes=ours.pinned_bytes(cfg, size),
    )
    ways = [] if facts.fits else remedy.remedies(cfg, size, available)
    _write(out / "plan.json", facts, found, ways)
    progress.say(table(cfg, facts, found))
    for line in [*keeping(cfg, size, facts), *host(cfg, size, facts), *speed(cfg, size)]:
        progress.say(line)
    problems = [] if facts.fits else refusal(cfg, facts, found, ways)
    problems += too_much_pinned(cfg, size, facts)
    if problems:
        raise DoesNotFitError(*problems)
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


def keeping(cfg: Config, size: Size, facts: PlanFacts) -> list[str]:
    """What is kept from the recompute, and how much more would fit."""
    names = {"card": "on the card", "pinned": "pinned"}
    counts = keep.summary(ours.kept(cfg, size))
    parts = [
        f"{names[where]} {', '.join(f'{name} of {num} layers' for name, num in found.items())}" for where, found in counts.items() if found
    ]
    roomiest = remedy.roomiest_keep(cfg, size, facts.available_bytes)
    lines = [f"kept from the recompute: {'; '.join(parts)}"] if parts else []
    more = f"kernels.keep_bytes={roomiest} fits too, and spares recompute"
    return [*lines, more] if roomiest >= cfg.kernels.keep_bytes + remedy.KEEP_STEP else lines


def host(cfg: Config, size: Size, facts: PlanFacts) -> list[str]:
    """What is pinned of the host's memory, with a warning and remedies where that is much."""
    if not facts.pinned_bytes:
        return []
    terms = ", ".join(f"{name} {_gb(num)}" for name, num in ours.pinned(cfg, size).items())
    limits = cards.pinned_limits(cfg.plan)
    has = f" of the {_gb(limits[1])} that Colab gives with a {facts.card}" if limits else ""
    lines = [f"pinned in the host's memory: {_gb(facts.pinned_bytes)}{has} ({terms})"]
    if limits and limits[0] < facts.pinned_bytes <= limits[1]:
        lines.append(f"warning: more than {_gb(limits[0])} pinned leave little for the rest of a machine of Colab's; less is pinned with")
        lines += _shown(remedy.pinned_remedies(cfg, size, limits[0], facts.available_bytes))
    return lines


def too_much_pinned(cfg: Config, size: Size, facts: PlanFacts) -> list[str]:
    """Why the host cannot pin that much, and what would do."""
    limits = cards.pinned_limits(cfg.plan)
    if not limits or facts.pinned_bytes <= limits[1]:
        return []
    why = f"does not fit: {_gb(facts.pinned_bytes)} of pinned memory, and a machine with a {facts.card} has {_gb(limits[1])} on Colab"
    return [f"{why}; for a larger machine give plan.vram_gb", *_shown(remedy.pinned_remedies(cfg, size, limits[0], facts.available_bytes))]


def speed(cfg: Config, size: Size) -> list[str]:
    """Seconds of a step and of evaluate's answers on the card of the plan."""
    if cfg.model.device == "cpu":
        return []
    card = cards.card(cfg.plan)
    generating = progress.duration(roofline.generation_s(cfg, size, card))
    lines = [f"evaluate generates for up to {generating} on such a card (evaluate.max_records, exact_match, max_new_tokens)"]
    step_s = roofline.step_s(cfg, size, card)
    if step_s and card.flops_per_s:
        rate = f"{card.flops_per_s / 1e12:g} TFLOP/s"
        lines.insert(0, f"estimated: {step_s:.1f} s for a pass of {tokens(cfg)} tokens and a step on such a card, at {rate}; not measured")
    return lines


def refusal(cfg: Config, facts: PlanFacts, found: Budget, ways: list[Remedy]) -> list[str]:
    """Why not, and which changes do fit."""
    term, num_bytes, setting = remedy.largest_movable(cfg, found)
    missing_bytes = facts.needed_bytes - facts.available_bytes
    missing = f"needs {_gb(facts.needed_bytes)}, the {facts.card} has {_gb(facts.available_bytes)}, {_gb(missing_bytes)} are missing"
    movable = f"the largest part that a setting moves is {term}, {_gb(num_bytes)} ({setting})"
    lines = [f"does not fit: {missing}; {movable}"]
    lines += _shown(ways)
    return (
        lines
        if ways
        else [*lines, "  no single setting makes it fit: lower data.max_tokens and adapter.rank together, or take a smaller model"]
    )


def _shown(ways: list[Remedy]) -> list[str]:
    return [f"  --set {way.setting:<30} needs {_gb(way.needed_bytes)}; costs: {way.cost}" for way in ways]


def _write(path: Path, facts: PlanFacts, found: Budget, ways: list[Remedy]) -> None:
    tree = facts.model_dump() | {"moment": found.moment, "other_moments": dict(found.aside), "remedies": [way._asdict() for way in ways]}
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _count(num: int) -> str:
    return f"{num / 1e9:.1f} billion" if num >= 1e9 else f"{num / 1e6:.0f} million"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
