"""mirror: two slots overwritten in place; one of them is whole at any moment, and nothing else is ever restored."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import MachineError, StaleError
from trainer.training import checkpoints, mirror
from trainer.training.checkpoints import Origin
from trainer.training.mirror import Mirror

ORIGIN = Origin(key="k", base_sha256="b", rank=4, dora=True)


def save(made: Mirror, out: Path, step: int, num_bytes: int = 3000) -> None:
    """A checkpoint of random bytes, a best adapter and metrics; then the copy of all of it."""
    written = out / "checkpoints" / "partial" / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "weights").write_bytes(random.Random(step).randbytes(num_bytes))
    (out / "best").mkdir(exist_ok=True)
    (out / "best" / "adapter").write_text(f"best of {step}")
    (out / "metrics.jsonl").write_text("line\n" * step)
    (out / "draft.json").write_text("made anew by who publishes")
    made.save(checkpoints.seal(written, out / "checkpoints", 2, ORIGIN), out)


def new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def restored(directory: Path, out: Path, origin: Origin = ORIGIN) -> int | None:
    """The step that a fresh machine goes on from."""
    Mirror(directory, origin).restore(out)
    found = checkpoints.newest(out / "checkpoints", origin)
    return checkpoints.step_of(found) if found else None


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """A directory with the slots of steps 1 to 4."""
    drive, out = new(tmp_path / "drive") / "run", new(tmp_path / "out")
    made = Mirror(drive, ORIGIN)
    for step in (1, 2, 3, 4):
        save(made, out, step, num_bytes=5000 - 1000 * step)
    return drive


def test_a_fresh_machine_gets_the_newest_checkpoint_and_what_belongs_to_it(drive: Path, tmp_path: Path) -> None:
    out = new(tmp_path / "fresh")
    assert restored(drive, out) == 4
    assert sorted(path.name for path in out.iterdir()) == ["best", "checkpoints", "metrics.jsonl"]
    assert (out / "checkpoints" / "checkpoint-4" / "weights").read_bytes() == random.Random(4).randbytes(1000)
    assert (out / "best" / "adapter").read_text() == "best of 4" and (out / "metrics.jsonl").read_text() == "line\n" * 4


def test_what_a_training_had_given_up_is_known_before_it_is_restored(tmp_path: Path) -> None:
    """Else a fresh machine would begin with the settings whose memory ran out, and refuse the slot for its rank."""
    drive, out = new(tmp_path / "drive") / "run", new(tmp_path / "out")
    made = Mirror(drive, ORIGIN)
    save(made, out, 1)
    (out / "attempt.json").write_text("lower rank")
    save(made, out, 2)
    assert mirror.companion(drive, "k", "attempt.json") == b"lower rank"
    assert mirror.companion(drive, "another", "attempt.json") is None, "another training's"
    (drive / "b.json").write_bytes(b"")
    assert mirror.companion(drive, "k", "attempt.json") is None, "torn; and the slot before it had none"
    assert mirror.companion(tmp_path / "nowhere", "k", "attempt.json") is None


def test_slots_are_overwritten_in_place(drive: Path, tmp_path: Path) -> None:
    """No link, no rename, nothing deleted, nothing new: on a Drive what is deleted keeps counting."""
    before = {path.name: path.stat().st_ino for path in drive.iterdir()}
    assert sorted(before) == ["a.json", "a.tar", "b.json", "b.tar"]
    made = Mirror(drive, ORIGIN)
    for step in (5, 6, 7):
        save(made, tmp_path / "out", step)
    assert {path.name: path.stat().st_ino for path in drive.iterdir()} == before
    assert all(path.stat().st_nlink == 1 for path in drive.iterdir())


def test_files_times_decide_nothing(drive: Path, tmp_path: Path) -> None:
    """The clock went back: the newest slot looks the oldest."""
    for path in drive.iterdir():
        os.utime(path, (1e9, 1e9) if path.name.startswith("b") else (2e9, 2e9))
    assert restored(drive, new(tmp_path / "fresh")) == 4


HARMS: dict[str, Callable[[Path, Path], object]] = {
    "flipped": lambda tar, _: tar.write_bytes(flipped(tar.read_bytes())),
    "cut": lambda tar, _: os.truncate(tar, tar.stat().st_size - 1),
    "half": lambda tar, _: os.truncate(tar, tar.stat().st_size // 2),
    "empty": lambda tar, _: os.truncate(tar, 0),
    "longer": lambda tar, _: tar.write_bytes(tar.read_bytes() + b"\0"),
    "gone": lambda tar, _: tar.unlink(),
    "a blank record": lambda _, record: record.write_bytes(b" " * 1024),
    "half a record": lambda _, record: os.truncate(record, 90),
    "no record": lambda _, record: record.unlink(),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("harm", HARMS)
def test_a_torn_slot_is_never_restored(harm: str, drive: Path, tmp_path: Path) -> None:
    HARMS[harm](drive / "b.tar", drive / "b.json")  # step 4
    assert restored(drive, new(tmp_path / "fresh")) == 3
    HARMS[harm](drive / "a.tar", drive / "a.json")
    both = new(tmp_path / "both")
    assert restored(drive, both) is None and not list(both.rglob("weights"))


@pytest.mark.parametrize("harm", HARMS)
def test_the_next_copy_goes_over_the_torn_slot(harm: str, drive: Path, tmp_path: Path) -> None:
    HARMS[harm](drive / "b.tar", drive / "b.json")
    before = (drive / "a.tar").read_bytes()
    save(Mirror(drive, ORIGIN), tmp_path / "out", 5)
    assert (drive / "a.tar").read_bytes() == before, "the last whole slot"
    assert restored(drive, new(tmp_path / "fresh")) == 5


def test_the_slot_of_another_training_is_not_restored_and_says_why(drive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ORIGIN.model_copy(update={"key": "other"})
    with pytest.raises(StaleError, match=r"slot b, step 4: key: k -> other(.|\n)*run\.fresh=true"):
        restored(drive, new(tmp_path / "fresh"), other)
    assert "slot b holds another training (key: k -> other): not restored" in capsys.readouterr().out
    Mirror(drive, other, fresh=True).restore(new(tmp_path / "wanted"))
    assert not list((tmp_path / "wanted").iterdir())
    Mirror(drive, ORIGIN.model_copy(update={"rank": 2})).restore(new(tmp_path / "lower"))
    assert not list((tmp_path / "lower").iterdir()), "the same training before it gave up rank"


def test_a_new_training_in_an_old_ones_mirror_is_the_newest_from_its_first_step(drive: Path, tmp_path: Path) -> None:
    made = Mirror(drive, ORIGIN.model_copy(update={"key": "new"}))
    save(made, new(tmp_path / "anew"), 1)
    found = mirror.Record.model_validate_json((drive / "a.json").read_bytes())
    assert (found.origin.key, found.step, found.count) == ("new", 1, 5)


def test_a_directory_that_is_not_there_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"checkpoint\.mirror = .*drive: no such directory; mount"):
        Mirror(tmp_path / "drive" / "run", ORIGIN)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from test_mirror import ORIGIN, Mirror, checkpoints, save
drive, out = Path({drive!r}), Path({out!r})
checkpoints.tidy(out)
made, found = Mirror(drive, ORIGIN), checkpoints.newest(out / "checkpoints", ORIGIN)
step = checkpoints.step_of(found) if found else 0
print("ready", flush=True)
while True:
    step += 1
    save(made, out, step, num_bytes=4_000_000)
"""


def test_a_kill_at_any_moment_of_a_copy_leaves_a_whole_slot(tmp_path: Path, root: Path) -> None:
    """SIGKILL while 4 MB are copied again and again."""
    drive, out = new(tmp_path / "drive") / "run", new(tmp_path / "out")
    made = Mirror(drive, ORIGIN)
    for step in (1, 2):
        save(made, out, step, num_bytes=4_000_000)
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(root), drive=str(drive), out=str(out))
    dice, torn = random.Random(1), 0
    steps = [1]
    for number in range(30):
        if number >= 5 and torn and steps[-1] > 2:
            break
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0.1, 0.7))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        torn += sum(not mirror.is_whole(drive, name) for name in mirror.SLOTS)
        fresh = new(tmp_path / f"fresh{number}")
        found = restored(drive, fresh)
        assert found is not None and found >= steps[-1]
        weights = fresh / "checkpoints" / f"checkpoint-{found}" / "weights"
        assert weights.read_bytes() == random.Random(found).randbytes(4_000_000)
        steps.append(found)
    assert torn and steps[-1] > 2, "some kills met a copy on its way, and there was progress"


def test_a_full_drive_warns_and_keeps_the_last_whole_slot(
    tmpfs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drive, out = tmpfs("256k"), new(tmp_path / "out")
    made = Mirror(drive / "run", ORIGIN)
    save(made, out, 1, num_bytes=60_000)
    save(made, out, 2, num_bytes=500_000)
    assert "warning: the mirror" in (said := capsys.readouterr().out) and "No space left" in said and "training goes on" in said
    assert restored(drive / "run", new(tmp_path / "fresh")) == 1
    save(made, out, 3, num_bytes=20_000)
    assert restored(drive / "run", new(tmp_path / "again")) == 3
