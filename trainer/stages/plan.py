"""Says before anything is downloaded whether a run fits, term by term, and what to change if it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from trainer import gemma3, progress
from trainer.artifacts import Inputs
from trainer.config import Config, Model
from trainer.errors import DoesNotFitError, ModelError
from trainer.facts import PlanFacts
from trainer.gemma3 import Size
from trainer.planner import cards, host, keep, ours, remedy, roofline, terms
from trainer.planner.budget import Budget, budget
from trainer.planner.most import Most, most
from trainer.planner.refusal import gb, refusal, shown
from trainer.planner.remedy import Remedy
from trainer.planner.roofline import Times
from trainer.planner.standing import tokens

VERSION = 3

EMBEDDED_BYTES = 253_000_000
"""The package that carries Gemma 3 270M."""
VISION_BYTES = 804 * 2**20
"""Vision tower and projector of the multimodal sizes: downloaded with the shards, never loaded."""
BAR_WIDTH = 28
MILLION = 1_000_000
"""Tokens of data that times are told for while there is no data."""


class Found(NamedTuple):
    """All that a plan says beside its facts. num_tokens: of an epoch; known: from the data's file, else a million is taken as an example."""

    budget: Budget
    ways: list[Remedy]
    most: Most
    times: Times
    step_s: float | None
    num_tokens: int
    known: bool
    disk: Mapping[str, int]
    memory: Mapping[str, int]


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
    all_found = look(cfg, size, facts, found)
    _write(out / "plan.json", cfg, size, facts, all_found)
    progress.say(table(cfg, facts, found))
    for line in [*grouped(cfg, size, found), "", *keeping(cfg, size, facts), *pinning(cfg, size, facts), *around(cfg, all_found), ""]:
        progress.say(line)
    problems = [] if facts.fits else refusal(cfg, found, name, available, all_found.ways)
    problems += too_much_pinned(cfg, size, facts)
    if problems:
        raise DoesNotFitError(*problems)
    progress.say(f"fits: {gb(available - facts.needed_bytes)} of {gb(available)} stay free; {longest(all_found.most, cfg)}")
    return facts


def look(cfg: Config, size: Size, facts: PlanFacts, found: Budget) -> Found:
    """Everything that is told and written beside the budget."""
    card, data = cards.card(cfg.plan), cfg.data.path
    known = data.is_file()
    num_tokens = data.stat().st_size // roofline.DATA_BYTES_PER_TOKEN if known else MILLION
    return Found(
        budget=found,
        ways=[] if facts.fits else remedy.remedies(cfg, size, facts.available_bytes),
        most=most(cfg, size, facts.available_bytes),
        times=roofline.times(cfg, size, card, facts.download_bytes, num_tokens),
        step_s=roofline.step_s(cfg, size, card),
        num_tokens=num_tokens,
        known=known,
        disk=host.disk(cfg, size, facts.download_bytes),
        memory=host.memory(cfg, size),
    )


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
    download = f"the first run downloads {gb(facts.download_bytes)}" if facts.download_bytes else "nothing to download"
    lines = [f"{about}, {kind}, {cfg.train.optimizer}, {cfg.model.dtype}", f"{download}\n"]
    for name, num_bytes in found.terms.items():
        bar = "█" * round(BAR_WIDTH * num_bytes / largest) or "▏"
        lines.append(f"  {name:<30}{gb(num_bytes):>10}  {bar}")
    lines.append(f"  {'needed at the peak (' + found.moment + ')':<30}{gb(facts.needed_bytes):>10}")
    lines.append(f"  {'the ' + facts.card + ' has':<30}{gb(facts.available_bytes):>10}")
    return "\n".join(lines)


def grouped(cfg: Config, size: Size, found: Budget) -> list[str]:
    """The terms in three groups, beside what early recipes claim where the run is the one that they speak of."""
    compared = gemma3.named(size) == "12b" and cfg.model.device == "cuda"
    lines = [
        f"  {'in three groups':<30}{'planned':>10}{'early recipes for a T4':>26}"
        if compared
        else f"  {'in three groups':<30}{'planned':>10}"
    ]
    for group, num in terms.grouped(found.terms).items():
        lines.append(f"  {group:<30}{gb(num):>10}" + (f"{gb(terms.CLAIM[group]):>26}" if compared else ""))
    return lines


def longest(found: Most, cfg: Config) -> str:
    """How far context and rank could go."""
    line = f"with all else as it is up to {found.tokens} tokens, or rank {found.rank}"
    roomy = cfg.kernels.layer == "ours" and found.roomy_tokens > found.tokens
    more = "kernels.keep_bytes=0, keep_pinned_bytes=0, span_layers=2, pin_gradients=true"
    return f"{line}; up to {found.roomy_tokens} tokens with {more}" if roomy else line


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


def pinning(cfg: Config, size: Size, facts: PlanFacts) -> list[str]:
    """What is pinned of the host's memory, with a warning and remedies where that is much."""
    if not facts.pinned_bytes:
        return []
    terms = ", ".join(f"{name} {gb(num)}" for name, num in ours.pinned(cfg, size).items())
    limits = cards.pinned_limits(cfg.plan)
    has = f" of the {gb(limits[1])} that Colab gives with a {facts.card}" if limits else ""
    lines = [f"pinned in the host's memory: {gb(facts.pinned_bytes)}{has} ({terms})"]
    if limits and limits[0] < facts.pinned_bytes <= limits[1]:
        lines.append(f"warning: more than {gb(limits[0])} pinned leave little for the rest of a machine of Colab's; less is pinned with")
        lines += shown(remedy.pinned_remedies(cfg, size, limits[0], facts.available_bytes))
    return lines


def too_much_pinned(cfg: Config, size: Size, facts: PlanFacts) -> list[str]:
    """Why the host cannot pin that much, and what would do."""
    limits = cards.pinned_limits(cfg.plan)
    if not limits or facts.pinned_bytes <= limits[1]:
        return []
    why = f"does not fit: {gb(facts.pinned_bytes)} of pinned memory, and a machine with a {facts.card} has {gb(limits[1])} on Colab"
    return [f"{why}; for a larger machine give plan.vram_gb", *shown(remedy.pinned_remedies(cfg, size, limits[0], facts.available_bytes))]


def around(cfg: Config, found: Found) -> list[str]:
    """Times, disk and memory of the machine: estimates, stage by stage."""
    return [*_speed(cfg, found), *_stages(cfg, found), *_machine(cfg, found)]


def _speed(cfg: Config, found: Found) -> list[str]:
    card = cards.card(cfg.plan)
    if found.step_s is None or card.flops_per_s is None:
        return []
    rate = f"{card.flops_per_s / 1e12:g} TFLOP/s"
    lines = [f"estimated: {found.step_s:.1f} s for a pass of {tokens(cfg)} tokens and a step on such a card, at {rate}; not measured"]
    passes = max(1, round(cfg.train.tokens_per_step / tokens(cfg)))
    step = progress.duration(passes * found.step_s)
    if found.times.train is not None:
        data = (
            f"{cfg.data.path}, about {found.num_tokens} tokens"
            if found.known
            else f"each million tokens of data ({cfg.data.path} is not there)"
        )
        amount = f"{cfg.train.max_steps} steps" if cfg.train.max_steps else f"{cfg.train.epochs:g} epochs of {data}"
        lines.append(f"estimated: {step} a step of {passes} passes; training {progress.duration(found.times.train)} for {amount}")
    return lines


def _stages(cfg: Config, found: Found) -> list[str]:
    """A line a stage: its time and its disk."""
    assumed = f"{roofline.DOWNLOAD_BYTES_PER_S / 1e6:g} MB/s of network, {roofline.DISK_BYTES_PER_S / 1e6:g} of disk, {host.CORES} cores"
    lines = [f"estimated times and disk ({assumed}):"]
    took = found.times._asdict()
    shown_as = {
        "download": "download",
        "quantise": "NF4 state",
        "load": "",
        "train": "train",
        "evaluate": "",
        "export": "export",
        "verify": "",
    }
    for stage, part in shown_as.items():
        most_of = "up to " if stage in ("evaluate", "verify") else ""
        time = "" if took[stage] is None else most_of + progress.duration(took[stage])
        lines.append(f"  {stage:<12}{time:>20}{gb(found.disk[part]) if part else '':>12}")
    total = sum(found.disk.values())
    free = shutil.disk_usage(_existing(cfg.paths.output)).free
    lines.append(f"  {'in all':<12}{'':>20}{gb(total):>12}, the download may go once the NF4 state is there; {gb(free)} are free here")
    if free < total - found.disk["download"]:
        lines.append("warning: that is too little here: make room, or take other disks: --set paths.output=DIR --set paths.cache=DIR")
    if cfg.checkpoint.mirror:
        lines.append(f"the mirror in {cfg.checkpoint.mirror}: {gb(host.mirror_bytes(cfg, model_size(cfg.model)))}, two slots")
    return lines


def _machine(cfg: Config, found: Found) -> list[str]:
    """Memory of the machine, with a warning where a stage needs more than there is."""
    limits = cards.pinned_limits(cfg.plan) if cfg.model.device == "cuda" else None
    parts = ", ".join(f"{stage} {gb(num)}" for stage, num in found.memory.items())
    has = f" of the {gb(limits[1])} of Colab's machine" if limits else ""
    lines = [f"estimated memory of the machine{has}: {parts}"]
    if limits:
        lines += [f"warning: {stage} needs more memory than that" for stage, num in found.memory.items() if num > limits[1]]
    return lines


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _write(path: Path, cfg: Config, size: Size, facts: PlanFacts, found: Found) -> None:
    """plan.json: the facts, every term with formula and source, and all that the table and the lines below it say."""
    tree = facts.model_dump() | {
        "moment": found.budget.moment,
        "other_moments": dict(found.budget.aside),
        "remedies": [way._asdict() for way in found.ways],
        "allocated_bytes": found.budget.allocated_bytes,
        "reserved_bytes": found.budget.reserved_bytes,
        "headroom_bytes": facts.available_bytes - facts.needed_bytes,
        "explained": terms.explained(found.budget.terms),
        "groups": terms.grouped(found.budget.terms),
        "claimed_groups": dict(terms.CLAIM),
        "largest": found.most._asdict(),
        "step_s": found.step_s,
        "times_s": found.times._asdict(),
        "epoch_tokens": found.num_tokens,
        "disk_bytes": dict(found.disk),
        "memory_bytes": dict(found.memory),
        "checkpoint_bytes": host.checkpoint_bytes(cfg, size),
        "mirror_bytes": host.mirror_bytes(cfg, size),
    }
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _count(num: int) -> str:
    return f"{num / 1e9:.1f} billion" if num >= 1e9 else f"{num / 1e6:.0f} million"
