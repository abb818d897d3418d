"""Three renderings of a conversation are one: prepare's, Ollama's TEMPLATE and the Jinja in the GGUF. And Hugging Face's.

TEMPLATE is evaluated here by the few rules of Go's text/template that it uses; engines' tests ask a real Ollama.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest

from trainer.dataset import template
from trainer.gguf import modelfile

HERE = Path(__file__).parent
GOLDEN = [json.loads(line) for line in (HERE / "conversations.jsonl").read_text(encoding="utf-8").split("\n") if line]
ENDING_WITH_USER = [case for case in GOLDEN if case["messages"][-1]["role"] == "user"]
named = pytest.mark.parametrize("case", ENDING_WITH_USER, ids=lambda case: case["name"])


def test_the_golden_manifest_holds_our_template() -> None:
    prompt = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["prompt"]
    assert prompt["template"] == modelfile.TEMPLATE
    assert tuple(prompt["stop"]) == modelfile.STOP
    assert [(rule["old"], rule["new"]) for rule in prompt["rewrite"]] == list(template.REWRITE)
    assert tuple(prompt["strip"]) == template.STRIP


@named
def test_prepare_cleans_and_renders_the_golden_conversations(case: dict[str, Any]) -> None:
    assert template.clean(case["messages"]) == case["rewritten"]
    assert template.render(case["rewritten"], generation=True) == case["rendered"]


@named
def test_ollamas_template_renders_them(case: dict[str, Any]) -> None:
    assert go(modelfile.TEMPLATE, case["rewritten"]) == case["rendered"]


@named
def test_the_jinja_in_the_gguf_renders_them(case: dict[str, Any]) -> None:
    assert jinja(modelfile.CHAT_TEMPLATE, case["rewritten"]) == f"<bos>{case['rendered']}"


@named
def test_hugging_faces_template_renders_them(case: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl")
    source = (Path(trl.__file__).parent / "chat_templates" / "gemma3.jinja").read_text(encoding="utf-8")
    assert jinja(source, case["rewritten"]) == f"<bos>{case['rendered']}"


def test_a_template_with_one_newline_too_many_is_seen() -> None:
    case = ENDING_WITH_USER[0]
    assert go(modelfile.TEMPLATE.replace("model\n{{ end }}", "model\n\n{{ end }}"), case["rewritten"]) != case["rendered"]


def jinja(source: str, messages: Sequence[Mapping[str, str]]) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701  # prompts are not HTML
    return environment.from_string(source).render(messages=messages, bos_token="<bos>", add_generation_prompt=True)


# --- Go's text/template, as far as TEMPLATE goes


def go(source: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama does: .System is the system messages' text; .Messages holds all."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    dot = {"System": system, "Messages": [{"Role": message["role"], "Content": message["content"]} for message in messages]}
    variables: dict[str, Any] = {"$": dot}
    return "".join(_run(_block(iter(_pieces(source)))[0], dot, variables))


def _pieces(source: str) -> list[tuple[str, str]]:
    """("text", ...) and ("action", ...), white space trimmed where an action says so."""
    pieces, trim = [], False
    for text, left, action, right in re.findall(r"(.*?)(?:\{\{(-?)\s*(.*?)\s*(-?)\}\}|$)", source, re.DOTALL):
        shown = text.lstrip() if trim else text
        pieces.append(("text", shown.rstrip() if left else shown))
        if action:
            pieces.append(("action", action))
        trim = bool(right)
    return pieces


def _block(pieces: Iterator[tuple[str, str]]) -> tuple[list[Any], str]:
    """Statements up to the `end` or `else` that closes them, and that word."""
    found: list[Any] = []
    for kind, text in pieces:
        word = text.split()[0] if kind == "action" else ""
        if word in ("end", "else"):
            return found, text
        found.append(_branch(text, pieces) if word in ("if", "range") else (kind, text))
    return found, ""


def _branch(text: str, pieces: Iterator[tuple[str, str]]) -> Any:
    word, _, condition = text.partition(" ")
    body, closing = _block(pieces)
    if closing.startswith("else if"):
        return word, condition, body, [_branch(closing.removeprefix("else "), pieces)]
    return word, condition, body, _block(pieces)[0] if closing == "else" else []


def _run(block: Sequence[Any], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for kind, text, *rest in block:
        if kind == "text":
            yield text
        elif kind == "if":
            yield from _run(rest[0] if _value(text, dot, variables) else rest[1], dot, variables)
        elif kind == "range":
            index, item, over = re.fullmatch(r"(\$\w+), (\$\w+) := (.*)", text).groups()  # type: ignore[union-attr]
            for number, value in enumerate(_value(over, dot, variables)):
                variables |= {index: number, item: value}
                yield from _run(rest[0], value, variables)
        elif assignment := re.fullmatch(r"(\$\w+) :?= (.*)", text):
            variables[assignment[1]] = _value(assignment[2], dot, variables)
        else:
            yield str(_value(text, dot, variables))


def _value(text: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    return _call(iter(re.findall(r'\(|\)|"[^"]*"|[^\s()]+', text)), dot, variables)


FUNCTIONS = {"eq": lambda a, b: a == b, "not": lambda a: not a, "len": len, "slice": lambda items, start: items[start:]}


def _call(tokens: Iterator[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    terms: list[Any] = []
    for token in tokens:
        if token == ")":
            break
        if token == "(":
            terms.append(_call(tokens, dot, variables))
        elif token.startswith('"'):
            terms.append(token[1:-1])
        elif token.isdigit():
            terms.append(int(token))
        elif token in FUNCTIONS:
            terms.append(FUNCTIONS[token])
        else:
            name, _, field = token.partition(".")
            value = variables[name] if name else dot
            terms.append(value[field] if field else value)
    return terms[0](*terms[1:]) if callable(terms[0]) else terms[0]
