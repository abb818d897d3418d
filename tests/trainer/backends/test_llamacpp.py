"""The wall around llama.cpp, with a real one: it answers, it reports every kind of death, and it never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from trainer.backends import llamacpp, tiny
from trainer.backends.llamacpp import Engine
from trainer.errors import EngineError
from trainer.gemma3 import SIZES
from trainer.gguf import modelfile, write

TEXT = "<start_of_turn>user\nevery  day at 12:30<end_of_turn>\n<start_of_turn>model\n"


class Random:
    """Base weights from a seed; an embedding this large makes the distributions uneven."""

    def linear(self, layer: int, name: str) -> Any:
        return self._values(SIZES["tiny"].linears()[name], layer) / 16

    def tensor(self, name: str) -> Any:
        return self._values(SIZES["tiny"].tensors()[name], len(name)) / 4

    def _values(self, shape: tuple[int, ...], seed: int) -> Any:
        return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    write.write(
        folder / "tiny.gguf", SIZES["tiny"], Random(), None, folder / "tokenizer.json", name="tiny", chat_template=modelfile.CHAT_TEMPLATE,
        quantization="q4_k_m", quantize=llamacpp.quantizer(), threads=1, advance=lambda n: None,
    )  # fmt: skip
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def engine(file: Path) -> Iterator[Engine]:
    with Engine(file, num_ctx=512, threads=1) as engine:
        yield engine


def test_tokens_are_those_of_the_tokenizer_the_file_was_made_from(engine: Engine) -> None:
    texts = [TEXT, "", "  two  spaces ", "\n\n\n", "naïve 漢字 🎉 x\u200by", "the minute of every hour, everyminute"]
    for text in texts:
        assert engine.tokenize(text, add_bos=True) == [2, *tiny.tokenizer().encode(text, add_special_tokens=False).ids], text


def test_the_distribution_is_a_softmax_over_the_whole_vocabulary(engine: Engine) -> None:
    ids = engine.tokenize(TEXT, add_bos=True)
    every = engine.next_logprobs(ids, 1000)
    assert len(every) == 640
    assert sum(np.exp(list(every.values()))) == pytest.approx(1, abs=1e-4)
    few = engine.next_logprobs(ids, 3)
    assert list(few) == sorted(every, key=every.__getitem__, reverse=True)[:3]


def test_position_after_position_is_what_each_alone_would_be(engine: Engine, file: Path) -> None:
    ids = engine.tokenize(TEXT, add_bos=True)
    one_by_one = [engine.next_logprobs(ids[:end], 640) for end in range(4, len(ids))]
    with Engine(file, num_ctx=512, threads=1) as fresh:
        alone = fresh.next_logprobs(ids[:-1], 640)
    # Kernels, and with them the rounding of activations to 8 bits, depend on how many tokens are evaluated at once.
    assert mean_difference(alone, one_by_one[-1]) < 0.05
    assert mean_difference(alone, one_by_one[0]) > 0.2


def test_greedy_answers_follow_the_most_likely_token(engine: Engine) -> None:
    ids = engine.tokenize(TEXT, add_bos=True)
    answer = engine.complete(ids, 6)
    assert len(answer.ids) == 6 and not answer.ended
    assert answer.ids[0] == next(iter(engine.next_logprobs(ids, 1)))
    assert engine.complete(TEXT, 6).ids == answer.ids, "a text gets <bos> as ids have it"


def test_many_answers_at_once_keep_their_order(engine: Engine) -> None:
    prompts = [engine.tokenize(f"{TEXT}{number}", add_bos=True) for number in range(9)]
    done: list[int] = []
    answers = engine.complete_all(prompts, 4, lambda: done.append(1))
    assert len(done) == 9
    firsts = [next(iter(engine.next_logprobs(prompt, 1))) for prompt in prompts]
    assert sum(answer.ids[0] == first for answer, first in zip(answers, firsts, strict=True)) >= 8
    assert engine.complete_all([], 4) == []


def test_a_prompt_beyond_the_context_is_refused_with_llama_cpps_words(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"refused /completion: .*exceeds the available context size"):
        engine.complete([5] * 600, 4)


def test_a_gguf_that_is_not_whole_is_one_clear_error(file: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(file.read_bytes()[:200_000])
    with pytest.raises(EngineError, match=r"torn\.gguf: llama\.cpp .*export again"), Engine(torn, num_ctx=512, threads=1):
        pass
    with (
        pytest.raises(EngineError, match="no such GGUF; run the stage export first"),
        Engine(tmp_path / "none.gguf", num_ctx=512, threads=1),
    ):
        pass


def test_a_crash_of_the_child_is_an_engine_error_that_names_the_signal(file: Path) -> None:
    with Engine(file, num_ctx=512, threads=1) as engine:
        os.kill(engine.pid, signal.SIGSEGV)
        with pytest.raises(EngineError, match=r"its process is gone \(killed by signal 11\)"):
            engine.complete([2, 107], 4)


def test_the_child_ends_when_its_parent_is_killed(file: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from trainer.backends.llamacpp import Engine\n"
        f"with Engine(Path({str(file)!r}), num_ctx=512, threads=1) as engine: print(engine.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=llamacpp.ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(child)


def mean_difference(one: dict[int, float], other: dict[int, float]) -> float:
    return float(np.mean([abs(one[token] - other[token]) for token in one]))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0", "Q6_K", "Q8_0"])
def test_the_quantisers_rows_read_back_as_the_rows(kind: str) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    data = llamacpp.quantizer()(rows, gguf.GGMLQuantizationType[kind])
    back = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.linalg.norm(back - rows) / np.linalg.norm(rows) < write.MAX_ROW_ERROR[gguf.GGMLQuantizationType[kind]]


def test_a_missing_libgomp_is_named_with_the_package_that_has_it() -> None:
    assert "apt-get install libgomp1" in llamacpp._why("libgomp.so.1: cannot open shared object file: No such file or directory")
