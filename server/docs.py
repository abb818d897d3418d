"""What this server offers: /openapi.json for programs, /docs for people, made of the same document.

The page is plain HTML without a script, so that it loads nothing from anywhere and its policy forbids everything but its style.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server import errors
from server.errors import ForbiddenHost, NotReady, ReleaseError, Shown, TooManyRequests, Unauthorized
from server.schemas import ChatBody, ChatEvent, CompletionBody, CompletionChunk, ErrorReply

ABOUT = """A fine-tuned Gemma 3 behind one guarded port. Every error is `{"error": {"message", "type", "code", "request_id"}}`; with
a Retry-After header it is worth another try. In a stream an error is an event of that shape, and no [DONE] follows."""
REF = "#/components/schemas/{model}"
APART: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody, ChatEvent, CompletionChunk)
"""Models that FastAPI does not see: paths read their bodies and write their events by themselves."""
GUARDED: list[dict[str, list[str]]] = [{"key": []}, {}]
"""A key, or none where the server has none."""
ASKED = (Unauthorized, ForbiddenHost, TooManyRequests, NotReady, ReleaseError)
"""What any guarded path may answer."""
GONE = 499
"""For the log alone: the client is no longer there."""

Content = dict[int | str, dict[str, Any]]


def failures(kinds: Iterable[type[Exception]] = tuple(errors.TABLE)) -> Content:
    """The errors of a path by their statuses, for its `responses`."""
    rows = [row for kind in kinds if (row := errors.TABLE[kind]).status != GONE] + [errors.BUG]
    return {status: _failure([row for row in rows if row.status == status]) for status in sorted({row.status for row in rows})}


def _failure(rows: list[Shown]) -> dict[str, Any]:
    described: dict[str, Any] = {"model": ErrorReply, "description": ", ".join(sorted({row.code for row in rows}))}
    if any(row.retry_after_s for row in rows):
        described["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return described


def body(kind: type[BaseModel], example: str) -> dict[str, Any]:
    """For a path that reads its body by itself: its `openapi_extra`."""
    content = {"schema": {"$ref": REF.format(model=kind.__name__)}, "example": json.loads(example)}
    return {"requestBody": {"required": True, "content": {"application/json": content}}, "security": GUARDED}


def stream(event: type[BaseModel]) -> Content:
    """The reply of a path that may stream: events whose data are JSON, an error among them, and at last the word [DONE]."""
    choices = [{"$ref": REF.format(model=kind.__name__)} for kind in (event, ErrorReply)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": choices}}
    described = {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}}, "required": ["data"]}
    return {200: {"description": "One JSON object, or events.", "content": {"text/event-stream": {"schema": described}}}}


def document(app: FastAPI) -> dict[str, Any]:
    tree = get_openapi(title=app.title, version="1", description=ABOUT, routes=app.routes)
    _, apart = models_json_schema([(kind, "validation") for kind in APART], ref_template=REF)
    parts = tree.setdefault("components", {})
    parts["schemas"] = {**parts.get("schemas", {}), **apart["$defs"]}
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key, made by `make key`."}}
    return tree


def _once(app: FastAPI) -> dict[str, Any]:
    """The document, kept where FastAPI keeps its own."""
    app.openapi_schema = app.openapi_schema or document(app)
    return app.openapi_schema


def router() -> APIRouter:
    paths = APIRouter()

    @paths.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        return JSONResponse(_once(request.app))

    @paths.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        policy = f"default-src 'none'; style-src '{_hash(STYLE)}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
        return Response(page(_once(request.app)), media_type="text/html", headers=headers)

    return paths


def _hash(style: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}"


STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
code, pre { font: 0.9em ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.75rem; background: #8882; border-radius: 0.4rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.75rem 0.3rem 0; border-bottom: 1px solid #8884; }
"""


def page(tree: Mapping[str, Any]) -> str:
    """The document as HTML; every word of it is escaped."""
    operations = [(path, method, found) for path, methods in tree["paths"].items() for method, found in methods.items()]
    sections = "\n".join(_section(tree, *operation) for operation in operations)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(tree["info"]["title"])}: API</title>
<style>{STYLE}</style></head>
<body>
<h1>{escape(tree["info"]["title"])}: API</h1>
<p>{escape(tree["info"]["description"])}</p>
<p>For programs: <a href="/openapi.json">/openapi.json</a>. To try it: <a href="/">the chat page</a>.</p>
{sections}
</body>
</html>
"""


def _section(tree: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>", f"<p>{escape(operation.get('description', ''))}</p>"]
    if content := operation.get("requestBody", {}).get("content", {}).get("application/json"):
        example = json.dumps(content["example"])
        parts.append(f"<pre>curl -s SERVER{escape(path)} -H 'Content-Type: application/json' -d '{escape(example)}'</pre>")
        parts.append(_table(("field", "type", ""), _fields(tree, content["schema"])))
    replies = ((status, _kinds(tree, reply), reply["description"]) for status, reply in operation["responses"].items())
    parts.append(_table(("status", "reply", ""), replies))
    return "\n".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _fields(tree: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    found = _resolve(tree, schema)
    for name, field in found["properties"].items():
        required = name in found.get("required", ())
        yield name, _kind(tree, field) + (", required" if required else ""), field.get("description", "")


def _resolve(tree: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = tree["components"]["schemas"][name] if name else schema
    return found


def _kind(tree: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A schema in a few words; null is left out, since every optional field may be null."""
    found = _resolve(tree, schema)
    if choices := found.get("anyOf") or found.get("oneOf"):
        kinds = dict.fromkeys(_kind(tree, choice) for choice in choices if choice.get("type") != "null")
        return " or ".join(kinds) if "properties" not in found else "object"
    if "enum" in found or "const" in found:
        return " or ".join(json.dumps(value) for value in found.get("enum", [found.get("const")]))
    if found.get("type") == "array":
        return f"list of {_kind(tree, found.get('items', {}))}"
    if "properties" in found:
        return "{" + ", ".join(found["properties"]) + "}"
    return str(found.get("type", "anything"))


def _kinds(tree: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
    return "; ".join(f"{kind}: {_kind(tree, content.get('schema', {}))}" for kind, content in reply.get("content", {}).items())
