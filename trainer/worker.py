"""One stage in one child process, so that the parent never imports torch and a crash there is a typed result here.

The parent writes `job.json`, starts `python -m trainer.worker job.json` and reads `outcome.json`, which the child writes
whole as its last act. A child that is gone without one has crashed. The child dies with its parent (PR_SET_PDEATHSIG), and
it inherits the run's lock, so that a second trainer cannot start while it still writes.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

import trainer.errors
from trainer.artifacts import RECORD, Record, write_whole
from trainer.config import Config
from trainer.errors import Interrupted, OutOfMemoryError, StoppedError, TrainerError, disk_full
from trainer.facts import Facts
from trainer.watchdog import Watchdog

F = TypeVar("F", bound=Facts)

WORDS = {
    "cuda": ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    "cpu": ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
}
"""What torch says, by device, where it has no class for it."""
WHOSE = {"cuda": "the card's", "cpu": "the machine's"}
PATIENCE_S = 120.0
"""How long an interrupted child may take to write its last checkpoint."""
POLL_S = 5.0
"""How often a watched child is looked at."""
ALLOCATOR = "PYTORCH_ALLOC_CONF"
STUCK = (
    "longer than 20 of its steps: stuck, and ended with the last checkpoint kept. Look at the card (nvidia-smi, dmesg) and the disk; "
    "the same command goes on from there, and oom.stall_minutes is the patience"
)
HOST_MEMORY = "Close other programs, or lower kernels.keep_pinned_bytes or data.max_tokens (python -m trainer plan shows what is pinned)"


class Job(BaseModel):
    """A stage to run. It is also the stage's Inputs: the published directories and what they measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    config: Config
    inputs: dict[str, Path]
    """Published directories by stage name."""
    out: Path

    def path(self, stage: str) -> Path:
        return self.inputs[stage]

    def facts(self, kind: type[F]) -> F:
        stage = kind.__name__.removesuffix("Facts").lower()
        record = Record.model_validate_json((self.inputs[stage] / RECORD).read_bytes())
        return kind.model_validate(record.facts)

    def run(self) -> Facts:
        """Run the stage in this process."""
        facts: Facts = importlib.import_module(f"trainer.stages.{self.stage}").run(self.config, self, self.out)
        return facts


class Outcome(BaseModel):
    """What outcome.json says: facts of a finished stage, or the TrainerError that ended it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["done", "failed"]
    facts: dict[str, Any] = {}
    error: str = ""
    problems: list[str] = []


def in_process(job: Job, kind: type[F]) -> F:
    """Run the job here. For stages that need no torch, and for tests that fork."""
    facts = job.run()
    assert isinstance(facts, kind)
    return facts


class Caller:
    """Runs jobs in child processes with the given environment. `keep` are descriptors a child inherits (the run's lock)."""

    def __init__(self, environment: Mapping[str, str], keep: tuple[int, ...] = ()) -> None:
        self._environment = dict(environment)
        self._keep = keep

    @property
    def allocator(self) -> str:
        """PYTORCH_ALLOC_CONF that children get."""
        return self._environment.get(ALLOCATOR, "")

    @property
    def card(self) -> str:
        """The card that children use, as CUDA_VISIBLE_DEVICES names it; empty where nobody chose one."""
        return self._environment.get("CUDA_VISIBLE_DEVICES", "")

    def __call__(self, job: Job, kind: type[F], *, allocator: str = "", watchdog: Watchdog | None = None) -> F:
        """Run the job in a child and return its facts. allocator: PYTORCH_ALLOC_CONF instead of the environment's.

        Raises:
            TrainerError: the leaf that ended the child; Interrupted on Ctrl-C or SIGTERM; StoppedError when it was killed or stuck.
        """
        with tempfile.TemporaryDirectory(prefix="trinity-") as scratch:
            file = Path(scratch) / "job.json"
            file.write_text(job.model_dump_json(), encoding="utf-8")
            command = [sys.executable, "-m", "trainer.worker", str(file), str(os.getpid())]
            environment = {**self._environment, ALLOCATOR: allocator} if allocator else self._environment
            killed_before = oom_kills()
            child = subprocess.Popen(command, env=environment, pass_fds=self._keep)
            try:
                _wait(child, watchdog)
            except KeyboardInterrupt:
                _end(child)
                raise interrupted(job, Path(scratch) / "outcome.json") from None
            killed = oom_kills() - killed_before
            return _facts(job, kind, Path(scratch) / "outcome.json", child.returncode, killed)


def _wait(child: subprocess.Popen[bytes], watchdog: Watchdog | None, poll_s: float = POLL_S) -> None:
    """Until the child is gone, or stuck."""
    while child.poll() is None:
        try:
            child.wait(poll_s if watchdog else None)
        except subprocess.TimeoutExpired:
            silent_s = watchdog.stuck_s() if watchdog else None
            if silent_s is not None:
                _end(child)
                raise StoppedError(f"train: no step for {silent_s / 60:.1f} minutes, {STUCK}") from None


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C means now
        child.kill()
        child.wait()


def _facts(job: Job, kind: type[F], report: Path, returncode: int, killed: int) -> F:
    if not report.is_file():
        if returncode == -signal.SIGKILL:
            why = "by the kernel, as the machine's memory ran out" if killed else "from outside, or as the machine's memory ran out"
            raise StoppedError(f"{job.stage} was killed {why}; the last checkpoint is kept. {HOST_MEMORY}; {_how_to_go_on(job)}")
        raise RuntimeError(f"the worker of {job.stage} ended with code {returncode} and no outcome; its own words stand above")
    outcome = Outcome.model_validate_json(report.read_bytes())
    if outcome.status == "failed":
        raise _leaf(outcome)
    return kind.model_validate(outcome.facts)


def interrupted(job: Job, report: Path) -> TrainerError:
    """How a child ended that was asked to: its own error where it had one, say that the last checkpoint found no room."""
    outcome = Outcome.model_validate_json(report.read_bytes()) if report.is_file() else Outcome(status="done")
    if outcome.status == "failed" and outcome.error != Interrupted.__name__:
        return _leaf(outcome)
    return Interrupted(_how_to_go_on(job))


def _leaf(outcome: Outcome) -> TrainerError:
    error: TrainerError = getattr(trainer.errors, outcome.error)(*outcome.problems)
    return error


def _how_to_go_on(job: Job) -> str:
    return f"interrupted in {job.stage}; what is finished is kept, the same command goes on from there"


def is_out_of_memory(error: BaseException, device: str = "cuda") -> bool:
    """The one place that knows which exceptions mean that the device's memory ran out.

    torch's own class; CUDA's and cuBLAS' words where a context, a handle or a kernel's workspace found no room; torch's CPU allocator.
    """
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(error).__mro__}
    return bool(names & {"torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}) or any(word in str(error) for word in WORDS[device])


def oom_kills() -> int:
    """Processes that the kernel killed for lack of memory, of this cgroup (v2, v1) and of the machine; 0 where nothing counts them."""
    files = [Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory/memory.oom_control"), Path("/sys/fs/cgroup/memory.events")]
    lines = [line.split() for file in files if file.is_file() for line in file.read_text(encoding="ascii").splitlines()]
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] == "oom_kill")


def _run(job: Job) -> Outcome:
    try:
        return Outcome(status="done", facts=job.run().model_dump(mode="json"))
    except TrainerError as error:
        return _told(error, error)
    except KeyboardInterrupt:
        return _failed(Interrupted(_how_to_go_on(job)))
    except MemoryError:
        return _failed(_host_memory(job))
    except (OSError, RuntimeError) as error:
        return _told(_out_of_memory(job, error) or disk_full(error), error)


def _host_memory(job: Job) -> StoppedError:
    return StoppedError(f"{job.stage}: the machine's memory ran out; the last checkpoint is kept. {HOST_MEMORY}")


def _out_of_memory(job: Job, error: Exception) -> TrainerError | None:
    """The device's memory; on a card's run torch's CPU allocator speaks of the host's."""
    device = job.config.model.device
    if is_out_of_memory(error, device):
        remedy = "lower data.max_tokens, then adapter.rank (python -m trainer plan shows what fits)"
        return OutOfMemoryError(f"{job.stage}: {WHOSE[device]} memory ran out: {error}", remedy)
    return _host_memory(job) if is_out_of_memory(error, "cpu") else None


def _told(known: TrainerError | None, error: Exception) -> Outcome:
    """The outcome of an error that has a name for the person; any other goes on as the bug it is."""
    if known is None:
        raise error
    return _failed(known)


def _failed(error: TrainerError) -> Outcome:
    return Outcome(status="failed", error=type(error).__name__, problems=list(error.problems))


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """`python -m trainer.worker job.json PARENT_PID`"""
    _die_with_parent(int(arguments[1]))
    signal.signal(signal.SIGTERM, _interrupt)
    file = Path(arguments[0])
    job = Job.model_validate_json(file.read_bytes())
    write_whole(file.with_name("outcome.json"), _run(job).model_dump_json().encode())
    return 0


def _die_with_parent(parent: int) -> None:
    """SIGTERM when the parent dies (Linux prctl(2), PR_SET_PDEATHSIG = 1): an orphan would go on writing."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
