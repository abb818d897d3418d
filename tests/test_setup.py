"""requirements/setup.sh on machines that are not this one: PATH holds only fakes of what it asks, and they write down what they were told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "env", "cat", "sed", "head", "sha256sum", "timeout", "mkdir", "chmod", "dirname", "uname", "getconf", "touch")

FAKE_UV = """#!/usr/bin/env bash
if [ "$1" = --version ]; then echo "uv ${FAKE_UV_VERSION:-0.13.0}"; exit; fi
echo "$*" >>"$RECORD"
case " $* " in
  " venv "*) mkdir -p "${!#}/bin" && touch "${!#}/bin/python" && chmod +x "${!#}/bin/python" ;;
  *--torch-backend=auto*) exit "${AUTO_INDEX_ANSWERS_WITH:-0}" ;;
  *--dry-run*) exit "${CPU_INDEX_ANSWERS_WITH:-0}" ;;
esac
"""
FAKE_SMI = """#!/usr/bin/env bash
echo "$DRIVER"
"""
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  *libgomp*) exit "${{GOMP:-0}}" ;;
  *"-m pip install"*) echo "python $*" >>"$RECORD"
    [ -z "${{NO_PIP:-}}" ] && mkdir -p .tools/bin && cp "$UV_SOURCE" .tools/bin/uv ;;
  "-m venv "*) echo "python $*" >>"$RECORD"; mkdir -p .tools/venv/bin && cp "$PIP_SOURCE" .tools/venv/bin/pip ;;
  *"(3, 11)"*) [ -z "${{OLD:-}}" ] && exec {sys.executable} "$@" ;;
  -V) echo "Python ${{OLD:-3.11.2}}" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
FAKE_PIP = """#!/usr/bin/env bash
echo "pip $*" >>"$RECORD"
cp "$UV_SOURCE" .tools/venv/bin/uv
"""
PINNED = "install --quiet --no-deps --only-binary :all: --require-hashes -r requirements/uv.txt"
"""What pip is told: the pin alone, its hash checked."""


class Machine:
    """A folder with a copy of requirements/, and a PATH of fakes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository"
        self.bin = folder / "bin"
        shutil.copytree(ROOT / "requirements", self.folder / "requirements")
        self.bin.mkdir()
        for tool in (*TOOLS, "cp"):
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)
        for tool in ("git", "make", "g++"):
            self.add(tool, "#!/usr/bin/env bash\n")
        self.add("uv", FAKE_UV)
        self.add("python3", FAKE_PYTHON)
        self._record = folder / "record"
        sources = {"UV_SOURCE": FAKE_UV, "PIP_SOURCE": FAKE_PIP}
        for name, text in sources.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {"PATH": str(self.bin), "RECORD": str(self._record), **{name: str(folder / name) for name in sources}}

    def add(self, tool: str, text: str) -> None:
        (self.bin / tool).write_text(text)
        (self.bin / tool).chmod(0o755)

    def remove(self, tool: str) -> None:
        (self.bin / tool).unlink()

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "requirements" / "setup.sh"), *arguments]
        return subprocess.run(command, env=self.environment | environment, capture_output=True, text=True, timeout=30)

    @property
    def told(self) -> list[str]:
        """What uv and pip were told, in order."""
        return self._record.read_text().splitlines() if self._record.exists() else []

    def installs(self) -> list[str]:
        return [line for line in self.told if line.startswith("pip install") and "--dry-run" not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def locked_version(name: str) -> str:
    lines = (ROOT / "requirements" / "torch.txt").read_text().splitlines()
    return next(line.split()[0].removeprefix(f"{name}==") for line in lines if line.startswith(f"{name}=="))


def test_a_new_driver_gets_the_locked_torch_and_unsloth(machine: Machine) -> None:
    machine.add("nvidia-smi", FAKE_SMI)
    done = machine.setup(DRIVER="580.95.05")
    assert done.returncode == 0, done.stderr
    first, second = machine.installs()
    assert first.endswith("--no-deps --require-hashes -r requirements/torch.txt")
    assert second.endswith("--no-deps --require-hashes -r requirements/trainer.txt -r requirements/server.txt -r requirements/dev.txt")
    assert not any("--torch-backend" in line for line in machine.told)


@pytest.mark.parametrize("driver", ["535.104.05", "579.99"])
def test_an_older_driver_gets_the_same_torch_for_its_cuda_unhashed_and_is_told_so(machine: Machine, driver: str) -> None:
    machine.add("nvidia-smi", FAKE_SMI)
    done = machine.setup(DRIVER=driver)
    assert done.returncode == 0, done.stderr
    first, second = machine.installs()
    assert first.endswith(f"--torch-backend=auto torch=={locked_version('torch')} torchvision=={locked_version('torchvision')}")
    assert "--require-hashes" not in first
    assert "requirements/trainer.txt" in second
    assert f"driver {driver.split('.', maxsplit=1)[0]} is older" in done.stderr
    assert "hashes NOT checked" in done.stderr


def test_an_older_driver_without_that_index_is_told_what_helps(machine: Machine) -> None:
    machine.add("nvidia-smi", FAKE_SMI)
    done = machine.setup(DRIVER="535.1", AUTO_INDEX_ANSWERS_WITH="2")
    assert done.returncode == 2
    assert "update the driver to 580 or newer" in done.stderr


def test_without_a_card_the_cpu_build_is_taken_where_its_index_answers(machine: Machine) -> None:
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    first, second = machine.installs()
    assert f"--torch-backend=cpu torch=={locked_version('torch')}" in first
    assert "-r requirements/demo.txt" in second
    assert "trainer.txt" not in second
    assert "CPU build" in done.stderr


def test_without_a_card_and_without_that_index_the_size_is_said_before_the_download(machine: Machine) -> None:
    done = machine.setup(CPU_INDEX_ANSWERS_WITH="2")
    assert done.returncode == 0, done.stderr
    first, second = machine.installs()
    assert first.endswith("--require-hashes -r requirements/torch.txt")
    assert "-r requirements/demo.txt" in second
    assert "about 3 GB to download" in done.stderr


def test_a_driver_that_sees_no_card_counts_as_none(machine: Machine) -> None:
    machine.add("nvidia-smi", "#!/usr/bin/env bash\necho 'No devices were found'\nexit 6\n")
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert "no NVIDIA card" in done.stderr


def test_a_second_setup_does_nothing_and_a_changed_lock_or_driver_makes_it_anew(machine: Machine) -> None:
    assert machine.setup().returncode == 0
    told = len(machine.told)
    again = machine.setup()
    assert (again.returncode, again.stderr, len(machine.told)) == (0, "", told)
    with (machine.folder / "requirements" / "dev.txt").open("a") as lock:
        lock.write("# changed\n")
    assert machine.setup().returncode == 0
    assert len(machine.told) == 2 * told
    machine.add("nvidia-smi", FAKE_SMI)
    assert machine.setup(DRIVER="580.1").returncode == 0
    assert any("trainer.txt" in line for line in machine.told)


def test_a_python_that_was_named_once_stays(machine: Machine) -> None:
    machine.add("python3.13", FAKE_PYTHON)
    assert machine.setup(PYTHON="python3.13").returncode == 0
    again = machine.setup()
    assert (again.returncode, again.stderr) == (0, "")


def test_an_install_that_fails_leaves_nothing_that_counts_as_ready(machine: Machine) -> None:
    failing = FAKE_UV.replace('" venv "', '*"-r requirements"*) exit 1 ;;\n  " venv "')
    machine.add("uv", failing)
    assert machine.setup().returncode != 0
    machine.add("uv", FAKE_UV)
    assert machine.setup().stderr != ""


def test_the_server_environment_has_no_torch(machine: Machine) -> None:
    done = machine.setup("server")
    assert done.returncode == 0, done.stderr
    (only,) = machine.installs()
    assert only.endswith("-r requirements/server.txt")
    assert "venv --quiet --clear --python" in machine.told[0]
    assert machine.told[0].endswith(".venv-server")


def test_the_server_lock_names_no_torch_and_the_demo_lock_no_unsloth() -> None:
    pins = {lock: (ROOT / "requirements" / f"{lock}.txt").read_text() for lock in ("torch", "trainer", "demo", "server", "dev")}
    assert "\ntorch==" in pins["torch"]
    assert "\nunsloth==" in pins["trainer"]
    assert not any("\ntorch==" in text or "\nnvidia-" in text for lock, text in pins.items() if lock != "torch")
    assert "unsloth" not in pins["demo"]


def test_the_server_lock_holds_for_64_bit_arm_and_no_other_does() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        pins = [line for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#")]
        assert all(("aarch64" in pin) == (lock.stem == "server") for pin in pins), lock


def test_locks_name_no_index_and_no_place() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        assert not [line for line in lock.read_text().splitlines() if "://" in line or line.startswith("--") or " /" in line]


def test_everything_missing_is_named_at_once_with_the_line_that_brings_it(machine: Machine) -> None:
    machine.remove("git")
    machine.remove("make")
    done = machine.setup(GOMP="1")
    assert done.returncode == 2
    assert "apt-get install -y git make libgomp1" in done.stderr
    assert machine.told == []


def test_a_python_that_is_too_old_is_named(machine: Machine) -> None:
    done = machine.setup(OLD="3.10.12")
    assert done.returncode == 2
    assert "Python 3.11 to 3.13 is needed, python3 is Python 3.10.12" in done.stderr
    assert "apt-get install -y python3.11" in done.stderr


def test_a_libc_that_is_too_old_is_named(machine: Machine) -> None:
    machine.remove("getconf")
    machine.add("getconf", "#!/usr/bin/env bash\necho glibc 2.27\n")
    done = machine.setup()
    assert done.returncode == 2
    assert "glibc 2.28 or newer is needed, this is glibc 2.27" in done.stderr


def test_64_bit_arm_may_serve_and_not_train(machine: Machine) -> None:
    machine.remove("uname")
    machine.add("uname", "#!/usr/bin/env bash\necho Linux aarch64\n")
    assert machine.setup("server").returncode == 0
    done = machine.setup()
    assert done.returncode == 2
    assert "this is Linux aarch64" in done.stderr


def test_a_card_needs_a_compiler(machine: Machine) -> None:
    machine.add("nvidia-smi", FAKE_SMI)
    machine.remove("g++")
    done = machine.setup(DRIVER="580.1")
    assert done.returncode == 2
    assert "apt-get install -y build-essential" in done.stderr


def test_uv_is_brought_by_pip_where_path_has_none(machine: Machine) -> None:
    machine.remove("uv")
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.told[0] == f"python -m pip {PINNED} --upgrade --target .tools"
    assert not any(line.startswith("python -m venv") for line in machine.told)
    machine.setup("server")
    assert sum("--target .tools" in line for line in machine.told) == 1


def test_uv_is_brought_by_a_venv_where_there_is_no_pip(machine: Machine) -> None:
    machine.remove("uv")
    done = machine.setup(NO_PIP="1")
    assert done.returncode == 0, done.stderr
    assert machine.told[1:3] == ["python -m venv .tools/venv", f"pip {PINNED}"]


def test_the_uv_that_is_brought_is_the_trainer_images() -> None:
    pinned = (ROOT / "requirements" / "uv.txt").read_text(encoding="utf-8")
    dockerfile = (ROOT / "docker" / "trainer.Dockerfile").read_text(encoding="utf-8")
    (version, sha256) = re.findall(r"echo (uv==[\d.]+) --hash=sha256:([0-9a-f]{64}) >", dockerfile)[0]
    assert f"\n{version} \\\n    --hash=sha256:{sha256}" in pinned


def test_the_readmes_line_for_another_torch_finds_the_uv_that_setup_brought(machine: Machine) -> None:
    machine.remove("uv")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^.*--reinstall-package torch .*$", readme, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-c", line], cwd=machine.folder, env=machine.environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert (
        machine.told[-1]
        == f"pip install --python .venv/bin/python --reinstall-package torch --torch-backend=cpu torch=={locked_version('torch')}"
    )


def test_a_uv_that_is_too_old_is_passed_by(machine: Machine) -> None:
    assert machine.setup(FAKE_UV_VERSION="0.5.1").returncode != 0  # the one that pip brings says so too
    assert "--target .tools" in machine.told[0]


def test_another_environment_is_refused(machine: Machine) -> None:
    done = machine.setup("sever")
    assert done.returncode == 2
    assert "'sever'" in done.stderr


@pytest.mark.parametrize("target", ["plan", "train"])
def test_records_whose_name_holds_blanks_and_an_apostrophe_arrive_as_one_word(target: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (".venv/bin/python", "requirements/setup.sh", "docker/train"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#!/usr/bin/env bash\nprintf '<%s>' \"$@\"\n")
        (tmp_path / name).chmod(0o755)
    command = ["make", "-s", target, "DATA=ada's own file.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert ("<data.path=ada's own file.json>" if target == "plan" else "<ada's own file.json>") in done.stdout


def test_every_make_target_has_a_line_of_help() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    makefile = (ROOT / "Makefile").read_text()
    targets = makefile.split(".PHONY: ")[1].split("\n")[0].split()
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")] == targets_in_order(makefile, targets)


def targets_in_order(makefile: str, targets: list[str]) -> list[str]:
    return sorted(targets, key=lambda target: makefile.index(f"\n{target}:"))
