"""docker/train on machines that are not this one: the environment can be made or not, Docker answers or not, and everything writes down what it was told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.scripted_machine import ScriptedMachine

ROOT = Path(__file__).resolve().parents[1]
SETUP = "#!/usr/bin/env bash\nexit ${SETUP_ENDS_WITH:-0}\n"
PYTHON = '#!/usr/bin/env bash\necho "python $*"\n'
DOCKER = """#!/usr/bin/env bash
[ -z "${NO_DOCKER:-}" ] || exit 1
case "$1 ${2:-}" in
  "info "*) echo '{"runc":{},"nvidia":{}}' ;;
  "compose version") ;;
  *) echo "docker $*" ;;
esac
"""
CARD = "#!/usr/bin/env bash\n"


class Machine(ScriptedMachine):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.folder / "docker").mkdir(parents=True)
        for name in ("train", "cards"):
            shutil.copy(ROOT / "docker" / name, self.folder / "docker")
        self.add(self.folder / "requirements" / "setup.sh", SETUP)
        self.add(self.folder / ".venv" / "bin" / "python", PYTHON)
        self.add(self.bin / "docker", DOCKER)

    def has_a_card(self) -> None:
        self.add(self.bin / "nvidia-smi", CARD)

    def train(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("train", *words, **environment)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_host_that_can_have_the_environment_trains_by_itself(machine: Machine) -> None:
    done = machine.train("tiny", "data/a.json", "--set", "train.epochs=1")
    assert done.stderr == "train: on this host\n"
    assert done.stdout == "python -m trainer report --preset tiny --set data.path=data/a.json --set train.epochs=1\n"


def test_a_host_that_cannot_trains_in_a_container_as_the_caller(machine: Machine) -> None:
    done = machine.train("tiny", "", SETUP_ENDS_WITH="2")
    assert "train: in a container" in done.stderr
    assert done.stdout.split(" run --rm --build ")[1] == "trainer report --preset tiny\n"


def test_without_docker_it_ends_as_the_setup_did(machine: Machine) -> None:
    done = machine.train("tiny", "", SETUP_ENDS_WITH="2", NO_DOCKER="1")
    assert done.returncode == 2
    assert "container" not in done.stderr


def test_an_interrupted_setup_starts_no_container(machine: Machine) -> None:
    done = machine.train("tiny", "", SETUP_ENDS_WITH="130")
    assert done.returncode == 130
    assert done.stdout == ""


def test_a_container_can_be_asked_for_and_a_host_too(machine: Machine) -> None:
    assert machine.train("tiny", "", IN="container").stdout.startswith("docker compose")
    assert machine.train("tiny", "", IN="host", SETUP_ENDS_WITH="2").returncode == 2
    assert "not cloud" in machine.train("tiny", "", IN="cloud").stderr


def test_the_service_keeps_its_card_only_where_there_is_one(machine: Machine) -> None:
    assert "compose.cpu.yaml" in machine.train("tiny", "", IN="container").stdout
    machine.has_a_card()
    assert "compose.cpu.yaml" not in machine.train("tiny", "", IN="container").stdout


def test_a_file_outside_of_data_is_shown_to_the_container_where_it_is_looked_for(machine: Machine, tmp_path: Path) -> None:
    (machine.folder / "mine.toml").touch()
    records = tmp_path / "records.json"
    records.touch()
    told = machine.train("mine.toml", str(records), IN="container").stdout
    assert f"--volume {machine.folder}/mine.toml:/trinity/mine.toml:ro --volume {records}:{records}:ro trainer" in told
    assert "--volume" not in machine.train("tiny", "data/records.json", IN="container").stdout
