"""The server's settings: flags of `python -m server`, else the environment (TRINITY_*), else the defaults here.

The only place of the server that reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, HttpUrl, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.errors import SetupError
from server.manifest import explain


class Settings(BaseSettings):
    """Serves the newest release of the trainer: POST /chat, and OpenAI's API on /v1/chat/completions.

    Every flag is also an environment variable: --ollama-url is TRINITY_OLLAMA_URL. Exit codes: 0 stopped when asked to,
    2 something that you can mend (one line says what), 130 interrupted.
    """

    model_config = SettingsConfigDict(
        env_prefix="TRINITY_",
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    engine: Literal["embedded", "ollama"] = "embedded"
    """Who computes: llama.cpp in a child process of this server, or an Ollama that runs already."""
    releases: Path = Path("output/gguf")
    """Directory of releases, whose link `current` is served; or one release."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets the whole network in."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    ollama_url: HttpUrl = HttpUrl("http://127.0.0.1:11434")
    """Where Ollama listens."""
    threads: int = Field(0, ge=0)
    """Threads of the embedded engine; 0 takes every core that this process may use."""
    slots: int = Field(1, ge=1, le=64)
    """Answers computed at the same time; with Ollama the same number as its OLLAMA_NUM_PARALLEL."""
    waiting: int = Field(8, ge=0)
    """Requests that may wait for a slot; further ones are refused with 503 and Retry-After."""
    queue_timeout_s: float = Field(60.0, gt=0)
    """Longest wait for a slot, seconds."""
    stall_timeout_s: float = Field(120.0, gt=0)
    """Longest silence of the engine within an answer, seconds."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest time that the embedded engine may take to load a model, seconds."""
    ping_s: float = Field(15.0, gt=0)
    """Silence after which a stream carries a comment, so that no proxy closes it, seconds."""
    max_body_bytes: int = Field(1_048_576, ge=1)
    """Largest request body that is read, bytes."""

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def load(argv: Sequence[str] | None = None) -> Settings:
    """Settings of this process; `argv` None leaves the command line alone.

    Raises:
        SetupError: a value that cannot be. (An unknown flag ends the process with argparse's own line and exit code 2.)
    """
    try:
        return Settings() if argv is None else Settings(_cli_parse_args=list(argv))
    except ValidationError as error:
        raise SetupError(f"settings: {explain(error)}: mend the flag, or the variable TRINITY_<NAME>") from error
