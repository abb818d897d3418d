"""The chat page at `/`: one HTML file, read once, with a policy that lets only its own script and style run."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

PAGE = Path(__file__).with_name("page") / "index.html"


def router() -> APIRouter:
    content = PAGE.read_bytes()
    headers = {
        "Content-Security-Policy": policy(content),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    paths = APIRouter()

    @paths.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type="text/html", headers=headers)

    return paths


def policy(page: bytes) -> str:
    """The Content-Security-Policy of `page`: its own inline script and style by their hashes, calls to this server, nothing else.

    Trusted types forbid every way from a string to HTML, so that an answer stays text even if the page made a mistake.
    """
    directives = {
        "default-src": "'none'",
        "script-src": _hashes(page, "script"),
        "style-src": _hashes(page, "style"),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _hashes(page: bytes, tag: str) -> str:
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>".encode(), page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found) or "'none'"
