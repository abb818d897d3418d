"""Writes the digest of every container image and the commit of every hub model beside its name: `make pin`.

    python requirements/pin.py              # asks the registries and the hub; what cannot be reached stays as it is, exit code 2
    python requirements/pin.py --missing    # names what has no pin yet, a line each; asks nobody

A pin stands where it is used: NAME:TAG becomes NAME:TAG@sha256:... in docker/ and compose.yaml, and a preset's [model] gets
`revision`. Digests come from the registry's answer to HEAD /v2/NAME/manifests/TAG, with an anonymous token where it wants one (the
OCI distribution specification); nothing is made up. Running it again takes what the tags and the hub's main branch are by then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence  # noqa: UP035 - the doctor runs this by a Python 3.8 too

ROOT = Path(__file__).resolve().parents[1]
REGISTRY, HUB = "https://registry-1.docker.io", "https://huggingface.co"
LIMIT_S = 20
IMAGE = re.compile(
    r"(?P<before>IMAGE=|:-|^FROM +|image: +)(?P<name>(?:[a-z0-9][a-z0-9._-]*(?::\d+)?/)*[a-z0-9][a-z0-9._-]*:[A-Za-z0-9_][\w.-]*)"
    r"(?P<pin>@sha256:[0-9a-f]{64})?(?![\w@])",
    re.MULTILINE,
)
"""Of Dockerfiles (ARG BASE_IMAGE=, FROM), compose files (image:, ${NAME:-...}) and .env.example; a tag is part of it."""
MODEL = re.compile(r'^name = "(?P<name>[\w.-]+/[\w.-]+)"[^\n]*\n(?P<pin>revision = "(?P<commit>[^"]*)"[^\n]*\n)?', re.MULTILINE)
DIGEST, COMMIT = re.compile(r"sha256:[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
)
"""An index first: its digest holds for every processor."""


class Unpinnable(Exception):
    """Nobody answered, or with something that is no pin."""


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="name what has no pin, and ask nobody")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--registry", default=REGISTRY, help="what stands for docker.io")
    parser.add_argument("--hub", default=HUB)
    options = parser.parse_args(arguments)
    texts = {path: path.read_text(encoding="utf-8") for path in files(options.root)}
    if options.missing:
        print(*sorted({name for text in texts.values() for name, pin in named(text) if not pin}), sep="\n")
        return 0
    return write(texts, options.registry, options.hub)


def files(root: Path) -> list[Path]:
    found = [*root.glob("docker/*.Dockerfile"), *root.glob("docker/*.yaml"), root / "docker" / ".env.example", root / "compose.yaml"]
    return sorted(path for path in [*found, *root.glob("trainer/presets/*.toml")] if path.is_file())


def named(text: str) -> list[tuple[str, str]]:
    """Every image and hub model in a text, with its pin or nothing."""
    images = [(found["name"], found["pin"] or "") for found in IMAGE.finditer(text)]
    return images + [(found["name"], found["commit"] or "") for found in MODEL.finditer(text)]


def write(texts: Mapping[Path, str], registry: str, hub: str) -> int:
    """Pin what can be: 0 where all could, else 2."""
    pins: dict[str, str] = {}
    failed = False
    for name in sorted({name for text in texts.values() for name, _ in named(text)}):
        try:
            pins[name] = digest(name, registry) if ":" in name else commit(name, hub)
            print(f"pin: {name} {pins[name]}")
        except Unpinnable as error:
            failed = True
            print(f"pin: {name} NOT pinned: {error}", file=sys.stderr)
    for path, text in texts.items():
        pinned = IMAGE.sub(lambda found: _image(found, pins), MODEL.sub(lambda found: _model(found, pins), text))
        if pinned != text:
            draft = path.with_name(f"{path.name}.new")
            draft.write_text(pinned, encoding="utf-8")
            draft.replace(path)
            print(f"pin: wrote {path}")
    return 2 if failed else 0


def _image(found: re.Match[str], pins: Mapping[str, str]) -> str:
    name = found["name"]
    return f"{found['before']}{name}@{pins[name]}" if name in pins else found[0]


def _model(found: re.Match[str], pins: Mapping[str, str]) -> str:
    if found["name"] not in pins:
        return found[0]
    line = found[0][: len(found[0]) - len(found["pin"] or "")]
    return f'{line}revision = "{pins[found["name"]]}"\n'


# --- who is asked


def digest(reference: str, docker_io: str) -> str:
    """Of the manifest that a registry has under NAME:TAG.

    Raises:
        Unpinnable: it cannot be reached, has no such tag, or says no digest.
    """
    path, _, tag = reference.rpartition(":")
    host, _, rest = path.partition("/")
    if rest and ("." in host or ":" in host or host == "localhost"):
        base, repository = f"https://{host}", rest
    else:
        base, repository = docker_io, path if rest else f"library/{path}"
    url = f"{base}/v2/{repository}/manifests/{tag}"
    headers = {"Accept": MANIFESTS}
    reply = ask(url, headers, "HEAD")
    if reply.status == 401:
        headers["Authorization"] = f"Bearer {token(reply.headers.get('www-authenticate', ''), repository)}"
        reply = ask(url, headers, "HEAD")
    if reply.status != 200:
        raise Unpinnable(f"{base} answers {reply.status} about it")
    found = reply.headers.get("docker-content-digest") or f"sha256:{hashlib.sha256(ask(url, headers, 'GET').body).hexdigest()}"
    if not DIGEST.fullmatch(found):
        raise Unpinnable(f"{base} says {found[:80]!r}, which is no digest")
    return found


def token(challenge: str, repository: str) -> str:
    """An anonymous token from where the registry sends us."""
    told = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if not challenge.lower().startswith("bearer ") or "realm" not in told:
        raise Unpinnable(f"its registry wants a login: {challenge[:80]!r}")
    query = {"scope": told.get("scope", f"repository:{repository}:pull")}
    if "service" in told:
        query["service"] = told["service"]
    tree = _object(ask(f"{told['realm']}?{urllib.parse.urlencode(query)}", {}, "GET"))
    found = tree.get("token") or tree.get("access_token")
    if not isinstance(found, str):
        raise Unpinnable(f"{told['realm']} gives no token")
    return found


def commit(name: str, hub: str) -> str:
    """Of a model's main branch.

    Raises:
        Unpinnable: the hub cannot be reached, has no such model, or says no commit.
    """
    reply = ask(f"{hub}/api/models/{name}/revision/main", {}, "GET")
    if reply.status != 200:
        raise Unpinnable(f"{hub} answers {reply.status} about it")
    found = _object(reply).get("sha")
    if not isinstance(found, str) or not COMMIT.fullmatch(found):
        raise Unpinnable(f"{hub} says {found!r}, which is no commit")
    return found


def _object(reply: Reply) -> dict[str, object]:
    try:
        tree = json.loads(reply.body)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def ask(url: str, headers: Mapping[str, str], method: str) -> Reply:
    request = urllib.request.Request(url, headers=dict(headers), method=method)  # noqa: S310 - from a registry's or the hub's address
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:  # noqa: S310
            return Reply(reply.status, {name.lower(): value for name, value in reply.headers.items()}, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, {name.lower(): value for name, value in error.headers.items()}, b"")
    except (OSError, ValueError) as error:
        raise Unpinnable(f"{urllib.parse.urlsplit(url).netloc} cannot be reached ({getattr(error, 'reason', error)})") from error


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
