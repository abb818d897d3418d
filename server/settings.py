"""The server's settings: flags of `python -m server`, else the environment (TRINITY_*), else a TOML file, else the defaults here.

The only place of the server that reads the environment.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from server.errors import SetupError
from server.manifest import explain


def _names(value: Any) -> Any:
    """Names with commas between them, as flags and variables have them; a TOML file may have a list."""
    return tuple(name for item in value.split(",") if (name := item.strip())) if isinstance(value, str) else value


def _without_secrets(url: HttpUrl) -> HttpUrl:
    """Addresses stand in logs and replies."""
    if url.username or url.password:
        raise ValueError("a user or password in an address would be shown with it: leave them out (--openai-key is for a key)")
    return url


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

Url = Annotated[HttpUrl, AfterValidator(_without_secrets)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]


class Settings(BaseSettings):
    """Serves the newest release of the trainer: POST /chat, and OpenAI's API on /v1/chat/completions.

    Every flag is also an environment variable (--ollama-url is TRINITY_OLLAMA_URL) and a line of the file that --config names
    (ollama_url = "..."). `python -m server check` looks whether all is well, `key` makes an API key, `release` moves releases,
    `chat` talks in the terminal.
    Exit codes: 0 stopped when asked to, 2 something that you can mend (one line says what), 130 interrupted.
    """

    model_config = SettingsConfigDict(
        env_prefix="TRINITY_",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = None
    """TOML file with further settings, named as here with underscores."""
    engine: Literal["embedded", "ollama", "openai"] = "embedded"
    """Who computes: llama.cpp in a child process of this server, an Ollama that runs already, or any server with OpenAI's API."""
    releases: Path = Path("output/gguf")
    """Directory of releases, whose link `current` is served; or one release."""
    state: Path = Path("output/state")
    """Directory where the loader writes which release is wanted (release.json); the server only reads it."""
    wait_for_loader: bool = False
    """A loader stays beside this server (`release load --watch`): until it has brought a release nothing is served, and this server loads none by itself."""
    keys: Path | None = None
    """File with the API keys' hashes; else keys.json in the state directory."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets the whole network in, and everybody then needs a key."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    ollama_url: Url = HttpUrl("http://127.0.0.1:11434")
    """Where Ollama listens."""
    ollama_models: Path | None = None
    """Ollama's directory of models, to look whether its disk has room for a release; else OLLAMA_MODELS, or its home's."""
    openai_url: Url = HttpUrl("http://127.0.0.1:8000/v1")
    """Where the server with OpenAI's API listens, /v1 included."""
    openai_key: SecretStr | None = None
    """Its key; rather a variable or a line of the file than a flag, which everybody on this machine can read."""
    openai_model: str = ""
    """The model's name there, where it is not the release's own (NAME:RELEASE): whoever sets it vouches for what it holds."""
    threads: int = Field(0, ge=0)
    """Threads of the embedded engine; 0 takes every core that this process may use."""
    slots: int = Field(1, ge=1, le=10_000)
    """Answers computed at the same time; with Ollama the same number as its OLLAMA_NUM_PARALLEL."""
    engine_models: int = Field(1, ge=1)
    """Models that the engine may hold at the same time, Ollama's OLLAMA_MAX_LOADED_MODELS: with 1, requests wait while a release is loaded."""
    engine_memory_bytes: int = Field(0, ge=0)
    """Memory that the engine may use for models; 0: no limit but what this machine has free, where the engine runs on it."""
    engine_here: bool = False
    """Ollama runs on this machine though its address is not the loopback's, as in containers: what the machine has free counts as well."""
    waiting: int = Field(8, ge=0)
    """Requests that may wait for a slot; further ones are refused with 503 and Retry-After."""
    queue_timeout_s: float = Field(300.0, gt=0)
    """Longest wait for a slot, seconds; also while a release is being changed."""
    first_token_timeout_s: float = Field(600.0, gt=0)
    """Longest time from the slot to the first token, seconds: a 12B on a CPU reads a long prompt for minutes."""
    stall_timeout_s: float = Field(120.0, gt=0)
    """Longest silence between two tokens, and longest time that a client may take to read what is ready for it, seconds."""
    total_timeout_s: float = Field(3600.0, gt=0)
    """Longest answer, from the slot on, seconds."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest time that the embedded engine may take to load a model, seconds."""
    ping_s: float = Field(15.0, gt=0)
    """Silence after which a stream carries a comment, so that no proxy closes it, seconds."""
    header_timeout_s: float = Field(10.0, gt=0)
    """Longest time in which a request's headers may come, seconds."""
    body_timeout_s: float = Field(30.0, gt=0)
    """Longest time in which a request's body may come, seconds."""
    drain_s: float = Field(30.0, ge=0)
    """How long answers under way may take when the server is asked to stop, seconds."""
    max_connections: int = Field(2048, ge=1)
    """Connections open at the same time; further ones are closed at once."""
    max_body_bytes: int = Field(1_048_576, ge=1)
    """Largest request body that is read, bytes."""
    max_messages: int = Field(1000, ge=1)
    """Most messages in one conversation."""
    max_message_chars: int = Field(500_000, ge=1)
    """Longest message, characters."""
    max_answer_tokens: int = Field(8192, ge=1)
    """Longest answer, tokens; a wish for more is cut to this."""
    key_requests_per_minute: int = Field(60, ge=1)
    """What a new API key may ask a minute."""
    key_concurrent: int = Field(4, ge=1)
    """What a new API key may have under way at the same time, waiting included."""
    allowed_hosts: Names = ()
    """Names by which this server may be called while it has no key, beside the loopback's; with commas between them."""
    cors_origins: Names = ()
    """Origins whose pages may call this server from a browser (https://a.example); none by default."""
    log_format: Literal["text", "json"] = "text"
    """One line a request for people, or one JSON object."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def ollama_store(self) -> Path | None:
        """Where Ollama's blobs lie, as far as this process can see them."""
        if self.ollama_models:
            return self.ollama_models
        place = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
        return place if self.ollama_url.host in LOOPBACK and place.is_dir() else None

    @property
    def keys_file(self) -> Path:
        return self.keys or self.state / "keys.json"


class KeyCommand(Settings):
    """Makes an API key, of which only the hash is kept, and prints it; a server that runs knows it at once.

    It may ask --key-requests-per-minute times a minute, --key-concurrent at the same time. Once there is a key, the server asks for
    one on the loopback too.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m server key")

    name: str = ""
    """Whose it is, for metrics and logs; else key-1 and so on."""
    remove: str = ""
    """Name of a key that shall open nothing any more; none is made."""


S = TypeVar("S", bound=Settings)


def load(argv: Sequence[str] | None = None) -> Settings:
    """Settings of this process; `argv` None leaves the command line alone. Raises like load_as()."""
    return load_as(Settings, argv)


def load_as(kind: type[S], argv: Sequence[str] | None) -> S:
    """Likewise for a command with flags of its own.

    Raises:
        SetupError: a value that cannot be. (An unknown flag ends the process with argparse's own line and exit code 2.)
    """
    chosen = _read(kind, argv)
    if chosen.config is None:
        return chosen
    if not chosen.config.is_file():
        raise SetupError(f"--config {chosen.config}: no such file")

    class WithFile(kind):  # type: ignore[misc,valid-type]  # a class made of a class that was handed in
        model_config = SettingsConfigDict(toml_file=chosen.config)

    return _read(WithFile, argv)


def _read(kind: type[S], argv: Sequence[str] | None) -> S:
    try:
        return kind() if argv is None else kind(_cli_parse_args=list(argv))
    except ValidationError as error:
        raise SetupError(f"settings: {explain(error)}: mend the flag, the variable TRINITY_<NAME> or the file's line") from error
    except (SettingsError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"settings: {error}") from error
