"""The ladder at work: what the parent does when memory runs out, and one real walk under a limit of the address space."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer import holders, oom, pipeline, worker
from trainer.config import Config
from trainer.errors import DoesNotFitError, OutOfMemoryError
from trainer.facts import TrainFacts

Make = Callable[..., Config]
FAILED = OutOfMemoryError("train: the machine's memory ran out: tried 8 GB", "advice")


def job(cfg: Config, prepared: Path, out: Path) -> worker.Job:
    return worker.Job(stage="train", config=cfg, inputs={"prepare": prepared}, out=out)


def lowered(cfg: Config, prepared: Path, out: Path, attempt: oom.Attempt) -> oom.Attempt:
    return pipeline._lower(job(cfg, prepared, out), attempt, FAILED, worker.Caller(os.environ))


def test_a_rung_is_shown_and_written_and_the_next_one_stands_below(
    tiny_config: Make, tiny_prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config()
    first = lowered(cfg, tiny_prepared, tmp_path, oom.read(tmp_path))
    second = lowered(cfg, tiny_prepared, tmp_path, oom.read(tmp_path))
    assert first.settings == {"train.batch_records": 1} and second == oom.read(tmp_path)
    assert second.settings == {"train.batch_records": 1, "data.max_tokens": 128}
    said = capsys.readouterr().out
    assert "train.batch_records 4 -> 1" in said and "data.max_tokens 256 -> 128" in said
    assert "0 of 24 records lose their oldest turns, 0 are left out" in said and "supervised tokens" in said


def test_the_policy_stop_gives_up_nothing_and_says_what_would_be_next(tiny_config: Make, tiny_prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"the next rung would be train\.batch_records 4 -> 1") as caught:
        lowered(tiny_config("oom.policy=stop"), tiny_prepared, tmp_path, oom.Attempt())
    assert caught.value.exit_code == 5 and not list(tmp_path.iterdir())


def test_a_context_that_costs_more_than_a_hundredth_needs_the_policy_lossy(tiny_config: Make, tiny_prepared: Path, tmp_path: Path) -> None:
    longest = max(len(json.loads(line)["ids"]) for line in (tiny_prepared / "train.jsonl").read_text().splitlines())
    settings = (f"data.max_tokens={2 * longest - 2}", "train.batch_records=1")
    with pytest.raises(OutOfMemoryError, match=r"would cost too much: 0 of 24 records lose .* are left out") as caught:
        lowered(tiny_config(*settings), tiny_prepared, tmp_path, oom.Attempt())
    assert "oom.policy=lossy" in str(caught.value) and not list(tmp_path.iterdir())
    after = lowered(tiny_config(*settings, "oom.policy=lossy"), tiny_prepared, tmp_path, oom.Attempt())
    assert after.settings == {"data.max_tokens": longest - 1} and "left out" in after.rungs[-1]


def test_after_the_last_rung_the_plans_table_is_shown(
    tiny_config: Make, tiny_prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_of_it: Mapping[str, Any] = {"train.batch_records": 1, "data.max_tokens": 128, "adapter.rank": 2, "adapter.dora": False}
    spent = oom.Attempt(settings=dict(all_of_it), rungs=("a -> b; costs: nothing",))
    with pytest.raises(OutOfMemoryError, match="nothing is left to give up") as caught:
        lowered(tiny_config(), tiny_prepared, tmp_path, spent)
    assert caught.value.exit_code == 5 and "a -> b; costs: nothing" in caught.value.problems
    table = capsys.readouterr().out
    assert "128 tokens, rank 2, LoRA" in table and "needed at the peak" in table


def test_memory_of_others_never_costs_quality() -> None:
    small, large = holders.Holder(9, "Xorg", 50 * 2**20), holders.Holder(12, "/usr/bin/ollama", 8 * 2**30)
    pipeline._refuse_holders([small], quality=False)
    pipeline._refuse_holders([], quality=True)
    for others, quality in (([small], True), ([small, large], False)):
        with pytest.raises(DoesNotFitError, match="pid 9") as caught:
            pipeline._refuse_holders(others, quality=quality)
        assert caught.value.exit_code == 4
    assert "ollama stop" in str(caught.value)


MEASURED = """
import sys
from pathlib import Path
from trainer import pipeline
from trainer.config import load
pipeline.run(load("tiny", sys.argv[1:]), "train", None)
status = Path("/proc/self/status").read_text()
print("peak", next(line.split()[1] for line in status.splitlines() if line.startswith("VmPeak")))
"""


@pytest.mark.slow
def test_a_training_that_runs_out_of_memory_goes_on_a_rung_lower_and_says_so(tiny_cache: Path, tmp_path: Path) -> None:
    """Real allocations that fail: the address space ends a little above what one row at a time needs."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations()))
    common = [f"paths.cache={tiny_cache}", f"data.path={data}", "export.num_ctx=8192", "data.valid_fraction=0.05", "train.max_steps=1"]
    low = ["data.max_tokens=4096", "train.batch_records=1", f"paths.output={tmp_path / 'low'}"]
    measured = subprocess.run([sys.executable, "-c", MEASURED, *common, *low], capture_output=True, text=True, check=True)
    limit = 1024 * int(measured.stdout.split()[-1]) + 100 * 2**20
    high = ["data.max_tokens=4096", "train.batch_records=4", f"paths.output={tmp_path / 'high'}", "run.fresh=false"]
    command = [sys.executable, "-m", "trainer", "train", "--preset", "tiny", *(f"--set={text}" for text in (*common, *high))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "high" / "runs" / "tiny" / "train" / "artifact.json").read_text())
    facts = TrainFacts.model_validate(record["facts"])
    assert [line.split(";")[0] for line in facts.rungs] == ["train.batch_records 4 -> 1"]
    assert (facts.max_tokens, facts.rank, facts.steps) == (4096, 4, 1)
    assert "DefaultCPUAllocator" in done.stdout


def conversations() -> list[list[dict[str, str]]]:
    """300 short ones and one whose older turn is long: what is cut there is less than a hundredth."""
    choose = random.Random(1)

    def turn(words: int, answer: str) -> list[dict[str, str]]:
        asked = " ".join(choose.choices(["every", "day", "noon", "hour", "five", "two", "monday", "night"], k=words))
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    return [*(turn(4, f"{number} {7 * number % 60} * * *") for number in range(300)), turn(700, "5") + turn(600, "6")]
