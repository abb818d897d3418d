"""A release whose probes cannot even be put is refused like one whose probes are not met."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.chat import Delta, Finish, Usage
from server.engines import probes
from server.errors import PromptTooLong, ReleaseError
from server.manifest import read
from tests.server.scripted import ScriptedEngine, small_release

pytestmark = pytest.mark.anyio


async def test_probes_that_are_met_pass(tmp_path: Path) -> None:
    release = read(small_release(tmp_path))
    await probes.check(ScriptedEngine([Delta("x"), Finish("stop", Usage(2, 1))]), release.model, release)


async def test_a_probe_that_is_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    release = read(small_release(tmp_path))
    with pytest.raises(ReleaseError, match="probe 0: the conversation is 5000 tokens long"):
        await probes.check(ScriptedEngine([PromptTooLong(5000, 4096)]), release.model, release)


async def test_a_probe_without_a_question_is_refused(tmp_path: Path) -> None:
    release = read(small_release(tmp_path))
    unasked = release.probes[0].model_copy(update={"messages": ()})
    with pytest.raises(ReleaseError, match="probe 0: messages must end with a user message"):
        await probes.check(ScriptedEngine(), release.model, type(release)(release.directory, release.manifest, (unasked,)))
