"""The tree of errors, named by who can mend them.

A TrainerError is one clear message for the person at the keyboard: what is wrong, where (file, line, value) and what to
do about it. `python -m trainer` prints it without a traceback and exits with the leaf's `exit_code`; any other exception
is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class TrainerError(Exception):
    """Root of the tree. `problems` holds one sentence each; all that were found, never just the first."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems


class ConfigError(TrainerError):
    """A preset or a --set that cannot be: unknown key, wrong type, contradiction."""


class DataError(TrainerError):
    """The user's records cannot be used: missing file, broken line, no assistant turn."""


class MachineError(TrainerError):
    """The machine lacks something: a package, a card, a compiler, room on the disk."""


class ModelError(TrainerError):
    """The base model cannot be used: absent, not a Gemma 3, weights that do not match their config."""


class ArtifactError(TrainerError):
    """Something under output/ cannot be trusted or would be lost."""


class TornError(ArtifactError):
    """A stage's directory lacks files or its artifact.json: it was not published whole."""


class EditedError(ArtifactError):
    """A stage's file differs from what was published."""


class StaleError(ArtifactError):
    """A train under another key stands in the way; the message shows the difference."""


class LockedError(ArtifactError):
    """Another process works on the same run."""


class PushError(TrainerError):
    """The model hub was not reached, or takes nothing from this token."""


class EngineError(TrainerError):
    """The embedded llama.cpp could not load or answer."""


class RefusedError(TrainerError):
    """Verify found that the GGUF does not answer like the model that was trained."""

    exit_code = 3


class DoesNotFitError(TrainerError):
    """The plan does not fit the card."""

    exit_code = 4


class OutOfMemoryError(TrainerError):
    """Training ran out of memory and nothing is left to give up."""

    exit_code = 5


class StoppedError(TrainerError):
    """Training stopped (NaN, stuck, host memory); the last good checkpoint is kept."""

    exit_code = 6


class Interrupted(TrainerError):
    """Ctrl-C or SIGTERM; the message says how to go on."""

    exit_code = 130


def disk_full(error: OSError | RuntimeError) -> MachineError | None:
    """What to tell the person when a write found no room; None for any other error. torch wraps the system's error in a text."""
    if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
        return None
    where = getattr(error, "filename", None) or "a disk under paths.output, paths.cache or the temporary directory"
    return MachineError(f"no space left on {where}; what was published before is whole. Free some room and run the same command again")


def read_only(error: OSError) -> MachineError | None:
    """What to tell the person when a place cannot be written at all; None for any other error."""
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        return None
    return MachineError(
        f"{error.filename or 'paths.output or paths.cache'} cannot be written ({error.strerror}); "
        "name places that can: --set paths.output=DIR --set paths.cache=DIR"
    )
