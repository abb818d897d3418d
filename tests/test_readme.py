"""What README.md says is true: its tree, its commands, its exit codes. Only the documents are read; nothing is trained or served."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from server import settings
from server.schemas import ChatBody, CompletionBody
from trainer import config, errors
from trainer.__main__ import _parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BODIES: dict[str, type[BaseModel]] = {"/chat": ChatBody, "/v1/chat/completions": CompletionBody}


def section(title: str, text: str = README) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def tree(text: str = README) -> list[str]:
    """Paths of the tree, whole: a line's indentation says in which folder it stands."""
    paths: list[str] = []
    folder = ""
    for line in blocks("text", section("The tree", text))[0].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        paths.append(f"{folder}{name}" if line.startswith(" ") else name)
    return paths


def commands(start: str, text: str = README) -> Iterator[list[str]]:
    """Words after `start` of every command in the shell blocks, comments cut off."""
    for block in blocks("sh", text):
        for line in block.splitlines():
            before, found, after = line.partition(start)
            if found and "#" not in before:
                yield shlex.split(after, comments=True)


def missing_paths(text: str) -> list[str]:
    return [path for path in tree(text) if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()]


def unlisted(text: str) -> set[str]:
    """What stands at the top of the repository, ignored things aside, and not in the tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return {name.split("/")[0] for name in files if name and (ROOT / name).exists()} - {path.split("/")[0] for path in tree(text)}


def unknown_targets(text: str) -> list[str]:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    inline = re.findall(r"`make ([a-z0-9-]+)[^`]*`", text)
    return [name for name in [*(words[0] for words in commands("make ", text)), *inline] if name not in targets]


def test_every_path_in_the_tree_exists() -> None:
    assert len(tree()) > 20
    assert missing_paths(README) == []


def test_everything_at_the_top_is_in_the_tree() -> None:
    assert unlisted(README) == set()


def test_every_make_command_exists() -> None:
    assert len(list(commands("make "))) > 5
    assert unknown_targets(README) == []


def test_every_trainer_command_parses() -> None:
    lines = list(commands("-m trainer "))
    assert len(lines) >= 3
    for words in lines:
        options = _parser().parse_args(words)
        config.load(options.preset, options.set)


def test_arguments_given_through_make_parse() -> None:
    for words in commands("make "):
        arguments = [word.removeprefix("ARGS=").split() for word in words if word.startswith("ARGS=")]
        for given in arguments:
            if words[0] == "serve":
                settings.load(given)
            else:
                config.load("gemma3-12b-t4", given[1::2])


def test_every_curl_sends_a_body_that_the_gateway_takes() -> None:
    seen = set()
    for words in commands("curl "):
        (url,) = [word for word in words if word.startswith("localhost:")]
        path = urlsplit(f"//{url}").path
        if "-d" in words:
            seen.add(path)
            BODIES[path].model_validate_json(words[words.index("-d") + 1])
    assert seen == set(BODIES)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TrainerError)]
    assert documented == {kind.exit_code for kind in kinds} | {0}


def test_versions_in_the_text_are_the_locked_ones() -> None:
    lock = (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8")
    for pin in re.findall(r"torch==[\d.]+", README):
        assert f"\n{pin} " in lock


def test_links_to_files_lead_somewhere() -> None:
    assert [link for link in re.findall(r"\]\(([^):#]+)\)", README) if not (ROOT / link).exists()] == []


def test_false_lines_are_seen() -> None:
    assert missing_paths(README.replace("  pipeline.py ", "  pipe.py ")) == ["trainer/pipe.py"]
    assert unlisted(README.replace("Makefile  ", "LICENSE   ")) == {"Makefile"}
    assert unknown_targets(README.replace("make plan ", "make plane ")) == ["plane"]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "bench" / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_figures_are_those_of_committed_rows() -> None:
    demo = rows("demo")[-1]["metrics"]
    minutes, seconds = divmod(round(demo["wall_s"]), 60)
    assert f"{minutes} min {seconds:02} s, {demo['peak_rss_bytes'] / 1e9:.1f} GB resident" in README
    base, tuned, served = (f"{demo[f'exact_match_{who}']:.0%}".replace("%", " %") for who in ("base", "tuned", "served"))
    assert f"base {base}, tuned {tuned}, served q4_k_m {served} of {demo['num_records']}" in README
    uncapped, capped = (row["metrics"] for row in rows("qdora_step")[:2])
    gigabytes = [f"{uncapped[name] / 1e9:.1f} GB" for name in ("peak_bytes", "reserved_bytes")]
    assert f"{uncapped['step_s']:.2f} s, {gigabytes[0]} allocated, {gigabytes[1]} reserved" in README
    assert capped["outcome"] == "out_of_memory"
