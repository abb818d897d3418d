"""The hub's other direction: a repository and one commit with all files, or none.

A file that arrived is not sent again: the hub knows it by its hash, so a push that was cut off goes on when it is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import PushError

TOKENS = "https://huggingface.co/settings/tokens"


def check_name(repository: str) -> None:
    """Raises PushError for a name that the hub cannot have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repository.count("/") != 1:
        raise PushError(f"{repository or 'no repository'}: write it as OWNER/NAME, for example ada/cron-gemma (make: REPO=OWNER/NAME)")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PushError(f"{repository}: no name for a repository ({_first_line(error)})") from error


def send(repository: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Make the repository where it is not there, commit `files` to it in one piece, return the page's address.

    Raises:
        PushError: no token, no right, no network, or a public repository where a private one was asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=_token())
    with _hub_errors(repository):
        url = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise PushError(f"{repository} is there and public; say so to push there (make: PUBLIC=1, else --public), or name another")
        api.create_commit(repository, [CommitOperationAdd(name, source) for name, source in sorted(files.items())], commit_message=message)
    return str(url)


def _token() -> str:
    from huggingface_hub import get_token

    remedy = f"make one that may write at {TOKENS}, then `export HF_TOKEN=...` or `.venv/bin/hf auth login`"
    token = get_token()
    if not token:
        raise PushError(f"no token of the hub: {remedy}")
    if not re.fullmatch(r"[!-~]+", token):  # it would stand in the HTTP library's error
        raise PushError(f"the hub's token (HF_TOKEN, or what `hf auth login` kept) holds blanks or letters that no token has: {remedy}")
    return token


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into one line with a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise PushError(f"{repository}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except (errors.HTTPError, errors.XetDownloadError, RuntimeError, ValueError, OSError) as error:
        raise PushError(f"{repository}: {_explained(error)}") from error


def _explained(error: BaseException) -> str:
    """huggingface_hub wraps what happened while a file was under way; the innermost answer of the hub tells most."""
    reply = None
    found: BaseException | None = error
    while found:
        reply = getattr(found, "response", None) or reply
        found = found.__cause__
    status = getattr(reply, "status_code", None)
    said = getattr(error, "server_message", None) or _first_line(error)
    if status == 401:
        return f"the hub does not take the token ({said}): it has run out, was revoked or is mistyped; {TOKENS}"
    if status == 403:
        return f"the token may not do that ({said}): it must be one that may write, and to this owner; {TOKENS}"
    if status is not None:
        return f"the hub answers {status} ({said}); run the same command again, what arrived is not sent twice"
    return f"the hub cannot be reached or the upload broke off ({said}); run the same command again, what arrived is not sent twice"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
