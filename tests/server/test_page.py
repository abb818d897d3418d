"""The chat page as it is sent: one file, and a policy under which nothing but its own script and style can run."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from server.page import PAGE, policy
from tests.server.scripted import ScriptedEngine, serving, small_release

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.anyio
async def test_the_page_needs_no_release_and_carries_its_policy(tmp_path: Path) -> None:
    small_release(tmp_path)
    async with serving(ScriptedEngine(), tmp_path, wait=False) as client:
        reply = await client.get("/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.content == PAGE.read_bytes()
    assert reply.headers["content-security-policy"] == policy(reply.content)
    assert (reply.headers["x-content-type-options"], reply.headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_the_policy_lets_in_the_page_s_own_script_and_style_by_their_hashes_and_nothing_else() -> None:
    rules = dict(rule.split(" ", 1) for rule in policy(TEXT.encode()).split("; "))
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", TEXT, re.DOTALL)
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert (rules["default-src"], rules["connect-src"], rules["img-src"]) == ("'none'", "'self'", "data:")
    assert (rules["require-trusted-types-for"], rules["trusted-types"], rules["frame-ancestors"]) == ("'script'", "'none'", "'none'")
    assert "unsafe" not in policy(TEXT.encode()) and "http" not in policy(TEXT.encode())


def test_a_page_without_script_allows_none() -> None:
    assert "script-src 'none'" in policy(b"<style>b{}</style>")


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_html_of_text() -> None:
    markup = re.sub(r"<script.*?</script>", "", TEXT, flags=re.DOTALL)
    assert not re.search(r"\b(?:src|action)=|<(?:iframe|object|embed|img|base)\b|\son\w+=|\sstyle=|@import|url\(", markup)
    assert all(target == "docs" or target.startswith(("#", "data:image/svg+xml,")) for target in re.findall(r'href="([^"]*)', markup))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\(|new Function", TEXT)


def test_every_field_and_button_has_a_name_and_every_id_that_the_script_asks_for_is_there() -> None:
    ids = re.findall(r'\sid="([^"]+)"', TEXT)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([^"]+)"\)', TEXT)) <= set(ids)
    for field in re.findall(r'<(?:textarea|input) id="([^"]+)"', TEXT):
        assert f'for="{field}"' in TEXT or re.search(rf"<label>[^\n]*<input id=\"{field}\"", TEXT), field
