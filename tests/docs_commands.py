"""Every command that a document shows, and where each is run: by tests/e2e/test_docs.py, or where ELSEWHERE says.

Keys are how a command begins; the longest that fits decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
INDENTED = re.compile(r"^    (?:make|python|docker|git|curl|uv|\.venv/)\S* .*", flags=re.MULTILINE)

HERE: Sequence[str] = (
    "make setup-server",
    "make plan",
    "make doctor",
    "make -s doctor",
    "make push REPO=ada/cron-gemma DRY=1",
    ".venv/bin/python -m trainer plan",
    ".venv/bin/python -m trainer export",
    "make serve",
    "make key",
    "make chat",
    "curl ",
    "from openai import",
    "python -m server release",
    ".venv/bin/python -m server release",
    ".venv/bin/pre-commit install",
)

NEEDS_A_CARD = "docs/logs/"
IMAGE = "tests/e2e/test_trainer_image.py::"
COMPOSE = "tests/e2e/test_compose.py::"
ELSEWHERE: dict[str, Sequence[str]] = {
    "make demo": [".ci/run: timed .ci/fresh-clone output demo"],
    "make test": [".ci/run: timed make test"],
    "make setup check test": [".ci/run: timed make setup", ".ci/run: timed make check", ".ci/run: timed make test"],
    "make e2e": [".ci/run: timed .venv/bin/python -m pytest -m e2e"],
    # The 12B's whole way ran on a card, with random weights; how the command finds host or container is tested.
    "make train": [
        f"{NEEDS_A_CARD}whole_run.log",
        "tests/test_train_command.py::test_a_host_that_can_have_the_environment_trains_by_itself",
    ],
    "make train IN=container": [f"{IMAGE}test_a_host_that_cannot_have_the_environment_trains_in_the_container_and_says_why"],
    "make train DATA=": ["tests/test_train_command.py::test_a_host_that_can_have_the_environment_trains_by_itself"],
    "make train ARGS=": ["tests/test_train_command.py::test_a_host_that_can_have_the_environment_trains_by_itself"],
    "TRINITY_UID=$(id -u)": [f"{IMAGE}test_without_a_card_the_12b_is_refused_in_one_line"],
    ".venv/bin/python -m trainer verify": [
        "tests/trainer/stages/test_verify.py::test_over_the_limit_with_kl_warn_it_passes_unverified",
        ".ci/run: timed .ci/fresh-clone output demo",
    ],
    # Of the next not the line itself runs but what it hands on to: bare up, logs, keys in a container, a backup's way back.
    "docker compose up": [f"{COMPOSE}test_without_a_release_everything_starts_shows_a_key_and_says_what_is_missing"],
    "make up": [f"{COMPOSE}test_without_a_release_everything_starts_shows_a_key_and_says_what_is_missing"],
    "make smoke": [f"{COMPOSE}test_the_memory_limit_is_what_the_release_needs"],
    "make logs": [f"{COMPOSE}test_a_release_that_comes_is_loaded_and_answers_through_the_published_port"],
    "make down": [f"{COMPOSE}test_down_and_up_keep_model_and_keys_even_where_the_releases_are_gone"],
    "docker/compose exec gateway python -m server key": [
        "tests/server/test_main.py::test_a_key_is_all_that_key_prints_and_opens_at_once_what_it_closes"
    ],
    "docker/compose run": [f"{COMPOSE}test_a_rollback_stays_and_a_backup_holds_what_cannot_be_made_again"],
    # A card of a T4's kind: nobody had one yet, so its parts are tested and the whole is not.
    "make smoke-t4": ["tests/bench/test_smoke_t4.py::test_three_steps_make_one_row_with_the_plan_beside_it"],
    # The hub itself: a hub of the tests' own takes the push.
    "make push": ["tests/trainer/test_push.py::test_a_release_arrives_whole_and_the_loader_takes_what_lies_on_the_hub"],
    # PyTorch's index: setup makes the same call where it answers.
    "$(requirements/setup.sh uv) pip install": ["tests/test_setup.py::test_without_a_card_the_cpu_build_is_taken_where_its_index_answers"],
    # Needs unsloth's packages, which a machine without a card has not: its result is what is held to the text.
    "cd .venv/lib/python3*/site-packages && find unsloth": ["tests/test_licences.py::test_the_counts_are_those_of_the_list"],
}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def without_comment(line: str) -> str:
    return re.sub(r"\s{2,}#.*$", "", line).strip()


def commands(text: str) -> list[str]:
    """Shell lines of one document without their comments, and Python blocks whole."""
    shell = "\n".join(blocks("sh", text)).replace("\\\n", " ").splitlines()
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [without_comment(line) for line in [*shell, *INDENTED.findall(outside)]]
    return [line for line in lines if line and not line.startswith("#")] + blocks("python", text)


def every_command(pages: Iterable[Path] = PAGES) -> list[str]:
    return list(dict.fromkeys(command for page in pages for command in commands(page.read_text(encoding="utf-8"))))


def place(command: str) -> str | None:
    """The longest key of HERE and ELSEWHERE with which it begins: `make up` is not how `make upgrade` begins."""
    fits = [
        key
        for key in [*HERE, *ELSEWHERE]
        if command.startswith(key) and not re.match(r"[a-z-]", command[len(key) :] if key[-1].isalpha() else "")
    ]
    return max(fits, key=len, default=None)


def run_here(start: str) -> list[str]:
    return [command for command in every_command() if place(command) == start]
