"""The trainer's image, built and run by the compose file's own service: a whole way on the CPU, as a caller who is nobody in the image."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.manifest import find, read
from tests.server.real import ROOT, absent, clean_environment

pytestmark = pytest.mark.e2e

PROJECT = "trinity-trainer-e2e"
CALLER = os.getuid() or 12345
"""Root would own what it wrote whatever the image did."""
OFFLINE = "services: {trainer: {network_mode: none}}\n"
LAUNCHER = """
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", 0, -1, 0};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
'''
print(compile_module_from_src(source, "launcher").__file__)
"""


class Trainer:
    """The compose file's trainer with a folder of the caller's own for output/, and nothing that needs a card."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        self.output.mkdir()
        for path in (folder, self.output):
            os.chown(path, CALLER, -1)
        self._offline = folder / "offline.yaml"
        self._offline.write_text(OFFLINE)
        self._compose = shlex.split(os.environ.get("COMPOSE") or "docker compose")
        self._environment = clean_environment(
            COMPOSE_PROJECT_NAME=PROJECT,
            TRINITY_OUTPUT=str(self.output),
            TRINITY_UID=str(CALLER),
            TRINITY_GID=str(os.getgid()),
            BUILD_NETWORK="host",
            **({"TRAINER_BASE_IMAGE": os.environ["BASE_IMAGE"]} if "BASE_IMAGE" in os.environ else {}),
        )

    def compose(self, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        files = [ROOT / "compose.yaml", ROOT / "docker" / "compose.cpu.yaml", *([self._offline] if offline else [])]
        named = [word for file in files for word in ("--file", str(file))]
        return self._call(*self._compose, "--profile", "train", *named, *words)

    def make(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """make train with these variables."""
        return self._call("make", "-s", "train", *(f"{name}={value}" for name, value in variables.items()))

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True)

    def build(self, name: str, lock: str) -> None:
        """The image `name` brought up to date: layers of unchanged docker/ and requirements/ come from Docker's cache."""
        earlier, self._environment = image(name), {**self._environment, "TRINITY_TRAINER_IMAGE": name, "TRAINER_LOCK": lock}
        built = self.compose("build", "trainer")
        assert built.returncode == 0, built.stdout + built.stderr
        if earlier not in ("", image(name)):  # it would keep gigabytes
            subprocess.run(["docker", "rmi", earlier], capture_output=True)

    def run(self, *words: str, entrypoint: str = "", offline: bool = False) -> subprocess.CompletedProcess[str]:
        instead = ["--entrypoint", entrypoint] if entrypoint else []
        return self.compose("run", "--rm", "--no-TTY", *instead, "trainer", *words, offline=offline)

    def cached(self) -> str:
        """Every file of the cache volume with its time; the memo of hashes is written at every end."""
        return self.run(
            ".cache", "-type", "f", "-not", "-name", "hashes.json", "-printf", "%p %T@\n", entrypoint="find", offline=True
        ).stdout


def image(name: str) -> str:
    """A built image's id; empty where there is none."""
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", name]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    """Both of its locks are built, so that neither breaks unseen; the last is run, since the other one is for cards."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        absent("no Docker engine answers: start one, or name it in DOCKER_HOST")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lie where only root may look
        service = Trainer(Path(folder))
        for name, lock in ((f"{PROJECT}-whole", "trainer"), (PROJECT, "demo")):
            service.build(name, lock)
        yield service
        service.compose("down", "--volumes")


@pytest.fixture(scope="module")
def trained(trainer: Trainer) -> Trainer:
    """After a whole way with the preset `tiny`."""
    way = trainer.make(PRESET="tiny", IN="container")
    assert way.returncode == 0, way.stdout + way.stderr
    return trainer


def test_its_release_lies_in_the_callers_folder_and_is_whole(trained: Trainer) -> None:
    directory = find(trained.output / "gguf")
    assert directory
    assert read(directory).gguf.is_file()


def test_everything_it_wrote_is_the_callers_to_read_and_to_delete(trained: Trainer) -> None:
    assert {path.lstat().st_uid for path in trained.output.rglob("*")} == {CALLER}
    copy = trained.output.with_name("copy")
    for command in (["cp", "-a", str(trained.output), str(copy)], ["rm", "-r", str(copy)]):
        subprocess.run(command, check=True, user=CALLER if os.getuid() == 0 else None)
    assert not copy.exists()


def test_a_second_run_without_a_network_makes_nothing_anew(trained: Trainer) -> None:
    before = trained.cached()
    again = trained.run("report", "--preset", "tiny", offline=True)
    assert again.returncode == 0, again.stdout + again.stderr
    said = again.stdout + again.stderr
    for stage in ("prepare", "train", "evaluate", "export", "verify", "release", "report"):
        assert f"{stage}: up to date" in said
    assert trained.cached() == before


def test_a_host_that_cannot_have_the_environment_trains_in_the_container_and_says_why(trained: Trainer) -> None:
    again = trained.make(PRESET="tiny", PYTHON="/none/python3")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Python 3.11 to 3.13 is needed" in again.stderr
    assert "train: in a container" in again.stderr


def test_the_run_without_a_network_has_none(trainer: Trainer) -> None:
    """Else the test above would show little."""
    asked = trainer.run("-c", "import socket; socket.create_connection(('1.1.1.1', 443), 5)", entrypoint="python", offline=True)
    assert "Network is unreachable" in asked.stderr


def test_triton_can_build_its_launcher_and_needs_no_compiler_the_second_time(trainer: Trainer) -> None:
    first = trainer.run("-c", LAUNCHER, entrypoint="python", offline=True)
    assert first.returncode == 0, first.stderr
    second = trainer.run("-c", f"import os; os.environ.update(PATH='', CC='/none')\n{LAUNCHER}", entrypoint="python", offline=True)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout


def test_data_and_the_image_itself_cannot_be_written(trainer: Trainer) -> None:
    for path in ("data/mine.jsonl", "trainer/mine.py"):
        written = trainer.run(path, entrypoint="touch", offline=True)
        assert "Read-only file system" in written.stderr


def test_without_a_card_the_12b_is_refused_in_one_line(trainer: Trainer) -> None:
    refused = trainer.run("train", "--preset", "gemma3-12b-t4", offline=True)
    assert refused.returncode == 2
    assert "no CUDA card found" in refused.stderr
