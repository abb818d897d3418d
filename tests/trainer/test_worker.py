from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import worker
from trainer.config import load
from trainer.errors import DoesNotFitError, Interrupted, MachineError, OutOfMemoryError, StoppedError, TrainerError, disk_full
from trainer.facts import PlanFacts
from trainer.watchdog import Watchdog


def job(out: Path, *settings: str) -> worker.Job:
    out.mkdir()
    return worker.Job(stage="plan", config=load("tiny", settings), inputs={}, out=out)


def test_a_child_returns_the_same_facts_as_this_process(tmp_path: Path) -> None:
    call = worker.Caller(os.environ)
    assert call(job(tmp_path / "a"), PlanFacts) == worker.in_process(job(tmp_path / "b"), PlanFacts)


def test_an_error_of_the_child_arrives_as_the_same_leaf_with_all_its_problems(tmp_path: Path) -> None:
    impossible = ("plan.vram_gb=0.001", "model.device=cuda")
    with pytest.raises(DoesNotFitError) as there:
        worker.Caller(os.environ)(job(tmp_path / "a", *impossible), PlanFacts)
    with pytest.raises(DoesNotFitError) as here:
        worker.in_process(job(tmp_path / "b", *impossible), PlanFacts)
    assert there.value.problems == here.value.problems


def test_every_leaf_of_the_tree_has_a_documented_exit_code() -> None:
    assert {leaf.exit_code for leaf in TrainerError.__subclasses__()} == {2, 3, 4, 5, 6, 130}


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent starts a child that arms itself and sleeps; the parent is killed; the child must be gone within seconds."""
    pid_file = tmp_path / "pid"
    child_code = (
        "import os, pathlib, time; from trainer import worker; worker._die_with_parent(os.getppid()); "
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent_code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child_code!r}])"
    parent = subprocess.Popen([sys.executable, "-c", parent_code])
    _wait(lambda: pid_file.is_file() and pid_file.read_text() != "")
    pid = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait(lambda: not _running(pid))


def _running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_a_full_disk_and_a_full_card_are_told_apart_from_bugs(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / "x"))
    assert worker._told(disk_full(full), full).problems[0].startswith(f"no space left on {tmp_path / 'x'}")
    assert disk_full(RuntimeError("PytorchStreamWriter failed: No space left on device")) is not None
    with pytest.raises(OSError, match="other"):
        worker._told(disk_full(OSError(5, "other")), OSError(5, "other"))
    assert worker.is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert worker.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not worker.is_out_of_memory(RuntimeError("shape mismatch"))


def test_torchs_cpu_allocator_speaks_of_the_host_on_a_cards_run_and_of_the_model_on_a_cpus(tmp_path: Path) -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert isinstance(worker._out_of_memory(job(tmp_path / "a"), caught.value), OutOfMemoryError)
    card = job(tmp_path / "b", "model.device=cuda")
    assert isinstance(worker._out_of_memory(card, caught.value), StoppedError)
    assert isinstance(worker._out_of_memory(card, RuntimeError("CUDA out of memory")), OutOfMemoryError)


@pytest.mark.gpu
def test_a_cards_own_errors_are_out_of_memory_and_its_other_errors_are_not() -> None:
    """A cap as a smaller card would be: torch's allocator, and cuBLAS' workspace within it. The sentinel is an index that is out of range."""
    import torch

    torch.cuda.set_per_process_memory_fraction(1e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        kept = torch.empty(900_000_000, dtype=torch.uint8, device="cuda")
        with pytest.raises(RuntimeError) as full:
            torch.empty(900_000_000, dtype=torch.uint8, device="cuda")
        with pytest.raises(RuntimeError) as wrong:
            kept.view(7, -1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert worker.is_out_of_memory(full.value)
    assert not worker.is_out_of_memory(wrong.value)


@pytest.mark.parametrize(("kills", "words"), [(1, "by the kernel, as the machine's memory ran out"), (0, "from outside")])
def test_a_killed_child_says_who_killed_it_as_far_as_anybody_counts(tmp_path: Path, kills: int, words: str) -> None:
    assert worker.oom_kills() >= 0
    with pytest.raises(StoppedError, match=words) as caught:
        worker._facts(job(tmp_path / "a"), PlanFacts, tmp_path / "outcome.json", -signal.SIGKILL, kills)
    assert "the last checkpoint is kept" in str(caught.value) and caught.value.exit_code == 6


def test_a_stuck_child_is_ended_and_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    """A real child that sleeps; the file that a step would write to was written once and never again."""
    metrics = tmp_path / "metrics.jsonl"
    watchdog = Watchdog(metrics, 0.1)
    metrics.touch()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(StoppedError, match="the last checkpoint kept"):
        worker._wait(child, watchdog, poll_s=0.2)
    assert child.returncode is not None


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (worker.Outcome(status="failed", error="MachineError", problems=["no room for a checkpoint"]), MachineError),
        (worker.Outcome(status="failed", error="Interrupted", problems=["after step 3"]), Interrupted),
        (worker.Outcome(status="done"), Interrupted),
        (None, Interrupted),
    ],
)
def test_a_child_that_was_interrupted_and_could_not_save_says_so(
    tmp_path: Path, outcome: worker.Outcome | None, kind: type[TrainerError]
) -> None:
    report = tmp_path / "outcome.json"
    if outcome:
        report.write_text(outcome.model_dump_json(), encoding="utf-8")
    error = worker.interrupted(job(tmp_path / "a"), report)
    assert type(error) is kind
    assert ("no room" in str(error)) is (kind is MachineError)
