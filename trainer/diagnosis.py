"""What a machine's own words mean for a run: texts of commands and plain numbers in, lines with a remedy out. Nothing is asked here.

Only the standard library, and no syntax newer than Python 3.8: this is read before anything is installed, by whatever Python there is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "warn", "fail"]

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The driver that each major version of CUDA wants (NVIDIA, "CUDA Compatibility", table of minimum drivers)."""
OLDEST_CARD = (7, 5)
"""Turing: the oldest that torch 2.14 is built for."""
OLDEST_OLLAMA = (0, 31, 2)
"""Older ones read memory through a GGUF (CVE-2026-7482, fixed in 0.17.1) or allocate without bound (fixed in 0.31.2)."""
OLDEST_COMPOSE = (2, 24)
OLDEST_GLIBC = (2, 28)
TOOLKIT = "install nvidia-container-toolkit, then `sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker`"
OUTSIDE = "update the driver to {}, or train outside the container with the torch that suits it: make train IN=host"
"""Another base image would start, and torch in it would still want the newer driver."""


class Line(NamedTuple):
    """remedy: a command or a step; empty where all is well."""

    name: str
    status: Status
    found: str
    remedy: str = ""


class Said(NamedTuple):
    """How a command ended. code is None where it is not installed or did not end in time."""

    code: int | None
    out: str = ""
    err: str = ""


class Card(NamedTuple):
    """capability: (7, 5) for a T4; None where the driver is too old to tell."""

    name: str
    driver: str
    capability: tuple[int, int] | None
    total_bytes: int
    free_bytes: int


class Torch(NamedTuple):
    """What is installed, read from its files. cuda: the CUDA it was built with; None is the CPU build."""

    version: str
    cuda: str | None


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def first(text: str) -> str:
    """The first line that says something, cut to a length that one line bears."""
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "")


# --- the system and its tools


def system(name: str, machine: str, libc: str) -> Line:
    """libc: as `getconf GNU_LIBC_VERSION` says it, "glibc 2.36"; empty where there is none."""
    found = f"{name} {machine}, {libc or 'no glibc'}"
    if name != "Linux":
        return Line("system", "fail", found, "use Linux: on Windows WSL2, on a Mac a virtual machine, or Colab")
    if not libc.startswith("glibc") or numbers(libc)[:2] < OLDEST_GLIBC:
        return Line("system", "fail", found, "wheels of torch want glibc 2.28 or newer: Debian 10, Ubuntu 20.04, RHEL 8 or newer")
    if machine in ("aarch64", "arm64"):
        return Line("system", "warn", f"{found}: serves releases, trains nothing", "train on x86-64 (Colab's T4), serve here")
    if machine != "x86_64":
        return Line("system", "fail", found, "use a machine with an x86-64 processor")
    return Line("system", "ok", found)


def python(version: Sequence[int], executable: str) -> Line:
    found = f"{'.'.join(map(str, version))} at {executable}"
    if (3, 11) <= tuple(version[:2]) <= (3, 13):
        return Line("python", "ok", found)
    return Line("python", "fail", f"{found}; 3.11 to 3.13 is needed", "apt-get install python3.12, then: make setup PYTHON=python3.12")


def build_tools(compiler: str | None, header: str, header_exists: bool, wants_card: bool) -> list[Line]:
    """Triton compiles its launcher on the machine that trains; a CPU run needs neither."""
    lacking: Status = "fail" if wants_card else "ok"
    why = "Triton builds its launcher with it" if wants_card else "needed only where a card trains"
    lines = [
        Line("compiler", "ok", compiler)
        if compiler
        else Line("compiler", lacking, f"no g++: {why}", "apt-get install -y build-essential" if wants_card else "")
    ]
    if header_exists:
        return [*lines, Line("headers", "ok", header)]
    remedy = "apt-get install -y python3-dev (python3.12-dev for a python3.12)" if wants_card else ""
    return [*lines, Line("headers", lacking, f"no {header}: {why}", remedy)]


# --- the card


def read_cards(smi: Said) -> list[Card]:
    """From `nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,memory.free --format=csv,noheader,nounits`."""
    cards = []
    for row in smi.out.splitlines() if smi.code == 0 else ():
        parts = [part.strip() for part in row.split(",")]
        if len(parts) == 5:
            name, driver, capability, total, free = parts
            major, _, minor = capability.partition(".")
            known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
            cards.append(Card(name, driver, known, *(int(mib) * 2**20 if mib.isdigit() else 0 for mib in (total, free))))
    return cards


def driver(smi: Said, cards: Collection[Card], wants_card: bool) -> Line:
    if cards:
        return Line("driver", "ok", f"NVIDIA {next(iter(cards)).driver}")
    told = first(smi.err) or first(smi.out)
    if smi.code is None:
        found = "no nvidia-smi: no NVIDIA driver"
        return Line("driver", "warn" if wants_card else "ok", found, "with a card: install its driver, 580 or newer" if wants_card else "")
    if "version mismatch" in told:
        return Line("driver", "fail", told, "the driver was updated while it ran: restart the machine")
    return Line(
        "driver", "fail" if wants_card else "warn", f"nvidia-smi: {told}", "install the card's driver again (580 or newer), and restart"
    )


def card(cards: Sequence[Card], wants_card: bool, preset: str) -> Line:
    if not cards:
        if not wants_card:
            return Line("card", "ok", f"none; {preset} runs on the processor")
        remedy = "train on Colab's T4 (notebooks/), or try everything here without a card: make demo; serving needs no card"
        return Line("card", "fail", f"none, and {preset} trains on one", remedy)
    found = ", ".join(f"{one.name} (sm_{one.capability[0]}{one.capability[1]})" if one.capability else one.name for one in cards)
    if len(cards) > 1:
        found += "; one is used, the freest"
    usable = [one for one in cards if one.capability is None or one.capability >= OLDEST_CARD]
    if not usable:
        remedy = "a T4 (sm_75) or newer; on Kaggle choose `GPU T4 x2`"
        return Line("card", "fail" if wants_card else "warn", f"{found}: torch has no kernels for a card this old", remedy)
    return Line("card", "ok", found)


def card_memory(cards: Sequence[Card], needed_bytes: int | None, preset: str) -> Line:
    """needed_bytes: the plan's, or None where the preset needs no card, or where nothing is installed that could plan."""
    if not cards:
        return Line("card memory", "ok", "no card")
    best = max(cards, key=lambda one: one.free_bytes)
    found = f"{gb(best.free_bytes)} of {gb(best.total_bytes)} free"
    if needed_bytes is None:
        return Line("card memory", "ok", found)
    found += f", {preset} needs {gb(needed_bytes)}"
    if best.free_bytes >= needed_bytes:
        return Line("card memory", "ok", found)
    if best.total_bytes >= needed_bytes:
        return Line("card memory", "fail", found, "other processes hold the rest: nvidia-smi names them; end them")
    return Line("card memory", "fail", found, "make plan PRESET=... shows which settings make it fit")


def torch(found: Torch | None, cards: Sequence[Card], probe: Said, reinstall: str) -> Line:
    """probe: the end of a child that put one operation on the card, its JSON on stdout; only looked at where there is a card.

    reinstall: the command that takes the build for this machine's driver.
    """
    if found is None:
        return Line("torch", "fail", "not installed", "make setup")
    about = f"{found.version}, built for {f'CUDA {found.cuda}' if found.cuda else 'CPU'}"
    if not cards:
        return Line("torch", "ok", about)
    if _json(probe.out).get("ran"):
        return Line("torch", "ok", f"{about}, ran on the card")
    return _idle_card(about, found.cuda, cards[0], probe, reinstall)


def _idle_card(about: str, cuda: str | None, card: Card, probe: Said, reinstall: str) -> Line:
    """Why torch cannot use the card."""
    if cuda is None:
        return Line("torch", "fail", f"{about}, beside a {card.name}", f"take the build for the driver: {reinstall}")
    wanted = OLDEST_DRIVER.get(numbers(cuda)[0], 0)
    if numbers(card.driver)[0] < wanted:
        why = f"{about}, which wants driver {wanted} or newer; this one is {card.driver}"
        return Line("torch", "fail", why, f"take the build for this driver: {reinstall}; or update the driver")
    if probe.code is None:
        return Line("torch", "warn", f"{about}; it did not answer in time (a cold disk, a busy machine?)", "make doctor again")
    why = first(str(_json(probe.out).get("error") or "")) or _last(probe.err) or "it sees no card"
    return Line("torch", "fail", f"{about}: {why}", f"take the build for the driver: {reinstall}")


# --- room


def memory(meminfo: str, limit_bytes: int | None, needed_bytes: int | None, preset: str) -> Line:
    """meminfo: /proc/meminfo; limit_bytes: a container's."""
    kib = {name: int(size) for name, size in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", meminfo, flags=re.MULTILINE)}
    total, available = (kib.get(name, 0) * 1024 for name in ("MemTotal", "MemAvailable"))
    if limit_bytes is not None:
        total, available = min(total, limit_bytes), min(available, limit_bytes)
    found = f"{gb(available)} of {gb(total)} available"
    if needed_bytes is None:
        return Line("memory", "ok", found)
    found += f", {preset} needs about {gb(needed_bytes)}"
    if total < needed_bytes:
        return Line("memory", "fail", found, "a machine with more memory, or less pinned: --set kernels.keep_pinned_bytes=0; see make plan")
    if available < needed_bytes:
        return Line("memory", "warn", found, "close what else runs")
    return Line("memory", "ok", found)


class Place(NamedTuple):
    """A directory on a disk: what is free there, the least that a run needs, and what it leaves if nothing is deleted on the way.

    None where nothing can say.
    """

    path: str
    free_bytes: int
    least_bytes: int | None
    all_bytes: int | None


def disk(places: Sequence[Place], preset: str) -> Line:
    """One place a disk: what lies on the same disk is counted together by who asks."""
    told, short, tight = [], False, False
    for one in places:
        need = "" if one.all_bytes is None else f", {preset} puts {gb(one.all_bytes)} there"
        told.append(f"{gb(one.free_bytes)} free for {one.path}{need}")
        short |= one.free_bytes < (one.least_bytes or 0)
        tight |= one.free_bytes < (one.all_bytes or 0)
    if short:
        return Line("disk", "fail", "; ".join(told), "make room, or name other disks: --set paths.output=DIR --set paths.cache=DIR")
    if tight:
        return Line(
            "disk", "warn", "; ".join(told), "delete the download (hub/ in paths.cache) once training has begun: the NF4 state replaces it"
        )
    return Line("disk", "ok", "; ".join(told))


# --- containers


def docker(info: Said) -> Line:
    """From `docker info --format '{{json .}}'`."""
    if info.code is None:
        return Line("docker", "warn", "not installed, or silent", "only for compose: apt-get install docker.io, or Docker's own packages")
    version = _json(info.out).get("ServerVersion")
    if version:
        return Line("docker", "ok", f"engine {version}")
    told = " ".join(part for part in (first(info.err), *map(str, _json(info.out).get("ServerErrors") or ())) if part)
    if "permission denied" in told:
        return Line("docker", "warn", "its socket is not yours", "sudo usermod -aG docker $USER, then log in again")
    if "Cannot connect" in told or "failed to connect" in told or "Is the docker daemon running" in told:
        return Line("docker", "warn", "the daemon does not run", "sudo systemctl enable --now docker")
    return Line("docker", "warn", told or "no answer", "docker info shows why")


def compose(said: Said) -> Line:
    """From `docker compose version --short`, or docker-compose's."""
    version = re.search(r"\d+\.\d+(\.\d+)?", said.out) if said.code == 0 else None
    wanted = ".".join(map(str, OLDEST_COMPOSE))
    remedy = f"apt-get install docker-compose-plugin ({wanted} or newer)"
    if version is None:
        return Line("compose", "warn", "not installed", remedy)
    if numbers(version[0]) < OLDEST_COMPOSE:
        return Line("compose", "warn", f"{version[0]} is too old", remedy)
    return Line("compose", "ok", version[0])


def gpu_runtime(info: Said, cards: Collection[Card], hook: bool) -> Line:
    """Whether containers can have the card, as docker/cards asks: a runtime called nvidia in `docker info --format '{{json .}}'`, or
    NVIDIA's hook (`hook`). CDI devices alone do not suffice: the compose files name the driver nvidia."""
    tree = _json(info.out)
    devices = [str(one.get("ID", "")) for one in tree.get("DiscoveredDevices") or () if isinstance(one, dict)]
    if hook or "nvidia" in (tree.get("Runtimes") or {}):
        return Line("gpu runtime", "ok", "containers can have the card" if cards else "nvidia, and no card")
    if not cards:
        return Line("gpu runtime", "ok", "none, and no card")
    if not tree.get("ServerVersion"):
        return Line("gpu runtime", "warn", "not known: Docker does not answer", "see docker")
    cdi = " (CDI alone is not what compose.yaml asks for)" if any(name.startswith("nvidia.com/gpu") for name in devices) else ""
    return Line("gpu runtime", "warn", f"Docker knows no nvidia runtime: containers see no card{cdi}", TOOLKIT)


def wanted_cuda(dockerfile: str) -> tuple[int, int] | None:
    """The CUDA of the base image that a Dockerfile names."""
    found = re.search(r"nvidia/cuda:(\d+)\.(\d+)", dockerfile)
    return (int(found[1]), int(found[2])) if found else None


def gpu_container(trial: Said | None, base: tuple[int, int] | None, cards: Sequence[Card]) -> Line:
    """Whether the trainer's image starts with the card. trial: a container of it that did nothing; None where there is no such image yet."""
    name = "gpu container"
    if not cards:
        return Line(name, "ok", "no card")
    have = cards[0].driver
    if trial is None:
        wanted = OLDEST_DRIVER.get(base[0], 0) if base else 0
        if base and numbers(have)[0] < wanted:
            found = (
                f"CUDA {base[0]}.{base[1]} in the trainer's image wants driver {wanted}; {have} will be refused (cuda>={base[0]}.{base[1]})"
            )
            return Line(name, "warn", found, OUTSIDE.format(wanted))
        return Line(name, "ok", "the trainer's image is not built yet")
    if trial.code == 0:
        return Line(name, "ok", "the trainer's image starts with the card")
    return refused(trial, have)


def refused(trial: Said, have: str) -> Line:
    """Why Docker did not start a container with the card, from its error."""
    name, told = "gpu container", trial.err or trial.out
    if unsatisfied := re.search(r"unsatisfied condition: cuda\s*>=\s*([\d.]+)", told):
        found = f"refused: the image wants CUDA {unsatisfied[1].rstrip('.')} and driver {have} is older (unsatisfied condition: cuda>=)"
        return Line(name, "warn", found, OUTSIDE.format(OLDEST_DRIVER.get(numbers(unsatisfied[1])[0], "a newer one")))
    if (
        "could not select device driver" in told
        or "nknown runtime" in told
        or "nknown or invalid runtime" in told
        or "unresolvable CDI" in told
    ):
        return Line(name, "warn", first(told), TOOLKIT)
    if "driver not loaded" in told or "nvml error" in told or "libnvidia-ml" in told:
        return Line(name, "warn", first(told), "the host's driver does not answer: nvidia-smi must work outside containers first")
    return Line(name, "warn", first(told) or "no answer in time", "docker run --rm --gpus all with the same image shows why")


# --- serving


def ollama(said: Said, serving: str | None) -> Line:
    """said: `ollama --version`; serving: the version of the one that answers on its port."""
    installed = re.search(r"version is (\d[\w.+-]*)", said.out + said.err)
    version = serving or (installed[1] if installed else None)
    if version is None:
        return Line("ollama", "ok", "not installed: compose brings its own, and the embedded engine needs none")
    found = f"{version}, {'running' if serving else 'not running'}"
    if numbers(version) < OLDEST_OLLAMA:
        wanted = ".".join(map(str, OLDEST_OLLAMA))
        holes = (
            "CVE-2026-7482 (memory is read through a GGUF)" if numbers(version) < (0, 17, 1) else "a GGUF makes it allocate without bound"
        )
        return Line("ollama", "warn", f"{found}: known hole: {holes}", f"update it to {wanted} or newer; the gateway refuses older ones")
    return Line("ollama", "ok", found)


def port(number: int, taken_by: str | None, remedy: str) -> Line:
    """taken_by: None where it is free; "" by somebody unknown; else who answers there, which is one of ours."""
    if taken_by is None:
        return Line(f"port {number}", "ok", "free")
    if taken_by:
        return Line(f"port {number}", "ok", taken_by)
    return Line(f"port {number}", "warn", "taken by another program", remedy)


# --- where things come from


def model(name: str, cached: bool, answer: tuple[int, str] | None, unreachable: str) -> Line:
    """Of a hub id. answer: status and body of the hub's reply about it, with the token if there is one; None: unreachable."""
    if cached:
        return Line("model", "ok", f"{name} lies in the cache")
    if answer is None:
        remedy = "connect, or set model.name to a directory that holds the model; make demo needs no hub"
        return Line("model", "fail", f"{name} is not in the cache and the hub cannot be reached ({unreachable})", remedy)
    status, body = answer
    if status == 200:
        return Line("model", "ok", f"{name} is on the hub, at {str(_json(body).get('sha') or '?')[:12]}")
    if status in (401, 403) and ("gated" in body or status == 403):
        remedy = "accept its licence on its page and `hf auth login`, or take unsloth/gemma-3-12b-it, which asks for no account"
        return Line("model", "fail", f"{name} is gated", remedy)
    if status in (401, 404):
        return Line("model", "fail", f"{name}: no such public model", "a typo, or a private one: hf auth login")
    return Line("model", "warn", f"the hub answers {status} about {name}", "try again later")


def pins(said: Said) -> Line:
    """From `requirements/pin.py --missing`: a name a line."""
    if said.code != 0:
        return Line("pins", "ok", "not looked at: this is no checkout")
    missing = said.out.split()
    if not missing:
        return Line("pins", "ok", "every image and model is pinned")
    return Line(
        "pins", "warn", f"not pinned: {', '.join(missing)}", "make pin, where the image registries and the model hub can be reached"
    )


def _json(text: str) -> Mapping[str, Any]:
    """The last line of a text that is a JSON object, else nothing: libraries print before it."""
    for line in reversed(text.strip().splitlines()):
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict):
            return tree
    return {}


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
