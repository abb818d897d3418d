"""`python -m server release`: the loader's commands."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pydantic_settings import CliImplicitFlag

from server import manifest, settings
from server.app import make_engine
from server.errors import ServerError, SetupError
from server.manifest import Release
from server.release import archive, space
from server.release.keeper import no_release
from server.release.loader import Host, Loader
from server.release.state import State, Wanted

USAGE = """\
usage: python -m server release load [RELEASE] [--watch] [SETTING ...]
       python -m server release list|memory|rollback|status [SETTING ...]

load      check a release, bring it to the engine, put its probes to it, and have the gateways serve it. RELEASE is its
          directory, a .zip or .tar of it, or a directory of releases; else the setting --releases. --watch stays and
          loads whatever becomes `current` there, but for what a rollback left
rollback  have the release before it served again
list      the releases that lie in --releases, and which of them is wanted
status    what is wanted, and whether the engine has it
memory    bytes that a container with Ollama needs for the newest release, or the wanted one: the limit that `make up` sets

Settings are those of `python -m server --help`; the same --state and --engine as the gateway's. Exit codes: 0 done, 2 something
that you can mend (one line says what; what was served before still is), 130 interrupted.
"""


class ReleaseCommand(settings.Settings):
    """What `python -m server release` understands beside the server's settings."""

    watch: CliImplicitFlag[bool] = False
    """Stay, and load whatever becomes current."""


def main(argv: Sequence[str]) -> int:
    command, *flags = argv or ["--help"]
    source = Path(flags.pop(0)) if command == "load" and flags and not flags[0].startswith("-") else None
    if command in ("-h", "--help") or {"-h", "--help"} & set(flags):
        print(USAGE, end="")
        return 0
    try:
        return asyncio.run(_run(command, source, settings.load_as(ReleaseCommand, flags)))
    except ServerError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2


async def _run(command: str, source: Path | None, chosen: ReleaseCommand) -> int:
    if command == "list":
        print(_listed(chosen))
        return 0
    if command == "memory":
        print(_memory(chosen))
        return 0
    if chosen.engine == "openai":
        raise SetupError("a server with OpenAI's API loads its own models; --engine embedded or ollama take releases")
    host = cast("Host", make_engine(chosen))
    loader = Loader(chosen, host, lambda line: print(f"release: {line}", flush=True))
    try:
        if command == "load" and chosen.watch:
            await loader.watch(source)
        elif command == "load":
            await loader.load(source)
        elif command == "rollback":
            await loader.rollback()
        elif command == "status":
            print(await _status(chosen, host))
        else:
            raise SetupError(f"no command {command!r}: there are load, list, memory, rollback and status")
    finally:
        await host.close()
    return 0


def _listed(chosen: ReleaseCommand) -> str:
    found = sorted(archive.listed(chosen.releases), key=lambda item: item.manifest.created, reverse=True)
    if not found:
        manifest.check_readable(chosen.releases)
    marks = _marks(State(chosen.state).read())
    lines = [
        f"{item.manifest.created:%Y-%m-%d %H:%M}  {item.manifest.files['gguf'].num_bytes / 1e9:6.2f} GB  "
        f"{marks.get(item.manifest.release, ''):8}  {item.manifest.name}:{item.manifest.release}  {item.path}"
        for item in found
    ]
    return "\n".join(lines) or f"no whole release in {chosen.releases}"


def _memory(chosen: ReleaseCommand) -> int:
    """Of the newest release and of the wanted one whichever needs more: either may have to answer, after a rollback too."""
    directory = manifest.find(chosen.releases)
    wanted = State(chosen.state).read()
    releases = [Release(directory, manifest.parse(directory / manifest.NAME), ())] if directory else []
    releases += [wanted.live.release] if wanted and wanted.live.release.gguf.is_file() else []
    if not releases:
        raise SetupError(no_release(chosen.releases))
    return max(space.need(release, chosen.slots).total for release in releases) + space.BESIDE_BYTES


def _marks(wanted: Wanted | None) -> dict[str, str]:
    if wanted is None:
        return {}
    before = {wanted.previous.manifest.release: "previous"} if wanted.previous else {}
    return before | {wanted.live.manifest.release: "wanted"}


async def _status(chosen: ReleaseCommand, host: Host) -> str:
    """What is wanted; and of Ollama, whose models are everybody's, whether it has it."""
    state = State(chosen.state)
    wanted = state.read()
    if wanted is None:
        return f"{state.path}: nothing was loaded yet; gateways serve {chosen.releases}/current by themselves"
    lines = [f"wanted    {wanted.live.release.model}  {wanted.live.digest[:19]}  {wanted.live.directory}"]
    if wanted.previous:
        lines.append(f"previous  {wanted.previous.release.model}  {wanted.previous.directory}")
    if chosen.engine == "ollama":
        found = await host.status(wanted.live.release.model)
        has = found.ready and found.digest == wanted.live.digest
        lines.append(f"engine    {found.detail}" if has else f"engine    has not what is wanted: {found.detail}; load it again")
    else:
        lines.append("engine    embedded: its gateway's /readyz says whether it answers")
    if state.loading():
        lines.append("loading   a loader is at work; requests wait for it")
    return "\n".join(lines)
