"""A machine that is not this one: some scripts of the repository in a folder, and stand-ins first in its PATH."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class ScriptedMachine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository"
        self.bin = folder / "bin"

    def add(self, path: Path, text: str = "#!/bin/sh\n") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, command: str, *words: str, search: str = os.environ["PATH"], **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of docker/, with nothing in its environment but PATH and this."""
        path = f"{self.bin}:{search}"
        return subprocess.run([self.folder / "docker" / command, *words], env={"PATH": path} | environment, capture_output=True, text=True)
