"""docker/compose, chat and smoke on machines that are not this one: with cards, without a toolkit, with an .env; docker writes down what it was told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.scripted_machine import ScriptedMachine

ROOT = Path(__file__).resolve().parents[1]
DOCKER = """#!/usr/bin/env bash
words=" $* "
case $words in
  " info "*) echo "{\\"runc\\":{}${RUNTIME:+,\\"$RUNTIME\\":{\\}}}" ;;
  *" release memory "*)
    [ -z "${UNREADABLE:-}" ] || { echo "Container trinity-loader-run Created" >&2; echo "release: output/gguf cannot be read" >&2; exit 2; }
    echo 3000000000
    ;;
  *" printenv TRINITY_PORT "*) sed -n 's/^TRINITY_PORT=//p' .env ;;
  *" port gateway "*) echo "127.0.0.1:${*: -1}" ;;
  *" up "*) echo "limit=${TRINITY_ENGINE_MEMORY_BYTES:-none} docker $*" ;;
esac
"""
SAYS = '#!/usr/bin/env bash\necho "$0 $*"\n'


class Machine(ScriptedMachine):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.copytree(ROOT / "docker", self.folder / "docker")
        (self.folder / ".env").write_text("TRINITY_PORT=9123\n")
        self.add(self.bin / "docker", DOCKER)

    def up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("compose", "up", **environment)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_card_ollama_computes_on_the_cpu_within_the_computed_limit(machine: Machine) -> None:
    done = machine.up(RUNTIME="nvidia")
    assert "up: Ollama computes on the CPU\n" in done.stderr and "3000 MB" in done.stderr
    assert "limit=3000000000 docker compose --file compose.yaml up --detach --wait" in done.stdout


@pytest.mark.parametrize("by", ["runtime", "hook"])
def test_a_card_that_docker_can_give_goes_to_ollama(machine: Machine, by: str) -> None:
    machine.add(machine.bin / "nvidia-smi")
    if by == "hook":
        machine.add(machine.bin / "nvidia-container-runtime-hook")
    done = machine.up(RUNTIME="nvidia" if by == "runtime" else "")
    assert "up: Ollama gets the GPU\n" in done.stderr
    assert "--file docker/compose.gpu.yaml up" in done.stdout


def test_a_card_that_docker_cannot_give_is_named_and_one_that_shall_not_be_used_too(machine: Machine) -> None:
    machine.add(machine.bin / "nvidia-smi")
    done = machine.up()
    assert "install NVIDIA's container toolkit" in done.stderr and "compose.gpu" not in done.stdout
    done = machine.up(GPU="no", RUNTIME="nvidia")
    assert "up: Ollama computes on the CPU, as GPU=no asks\n" in done.stderr and "compose.gpu" not in done.stdout
    assert "compose.gpu" in machine.up(GPU="yes").stdout


def test_a_word_that_gpu_does_not_know_is_refused(machine: Machine) -> None:
    done = machine.up(GPU="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "up: GPU is yes or no, not 1\n")


def test_where_no_limit_can_be_computed_it_says_why(machine: Machine) -> None:
    done = machine.up(UNREADABLE="1")
    assert "12 GB of compose.yaml, since none could be computed: release: output/gguf cannot be read\n" in done.stderr
    assert "limit=none" in done.stdout


def test_the_address_is_the_one_that_env_sets(machine: Machine) -> None:
    assert "up: 127.0.0.1:9123;" in machine.up().stdout


def test_chat_takes_the_environment_that_is_there_or_says_how_to_have_one(machine: Machine) -> None:
    nothing = machine.run("chat")
    assert nothing.returncode == 2 and "make up" in nothing.stderr and "make setup-server" in nothing.stderr
    for environment in (".venv-server", ".venv"):
        machine.add(machine.folder / environment / "bin" / "python", SAYS)
        assert machine.run("chat", "--message", "Hi").stdout.endswith(f"/{environment}/bin/python -m server chat --message Hi\n")


def test_smoke_names_the_program_that_it_needs(machine: Machine) -> None:
    for name in ("bash", "dirname", "env"):
        (machine.bin / name).symlink_to(shutil.which(name) or name)
    done = machine.run("smoke", search="/none")
    assert done.returncode == 1 and "apt-get install curl" in done.stdout
