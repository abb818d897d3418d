"""The wall around llama.cpp (xllamacpp): an engine in a child process, and the row quantiser in this one.

The engine is llama.cpp's own HTTP server on a free local port. It lives in a child, `python -m trainer.backends.llamacpp`,
because a crash in native code (a broken GGUF is enough) must not take the trainer with it; the child ends when its standard
input closes, so it never outlives us, whatever kills us. The quantiser is a pure function of the same library, called by
ctypes, which lets go of the interpreter: several threads quantise at once.
"""

from __future__ import annotations

import ctypes
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

from trainer.errors import EngineError, MachineError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from gguf import GGMLQuantizationType

ROOT = Path(__file__).resolve().parents[2]
NO_GOMP = "llama.cpp needs libgomp.so.1, which this machine lacks: sudo apt-get install libgomp1 (Fedora: dnf install libgomp)"
NO_PACKAGE = "the package xllamacpp (llama.cpp) is not installed: run make setup"
REQUEST_S = 3600.0
"""A prompt of 4096 tokens takes a 12B on two cores a quarter of an hour."""


class Completion(NamedTuple):
    text: str
    ids: tuple[int, ...]
    """Generated tokens; the end-of-turn token that ended them is the last, where one did."""
    ended: bool
    """By itself, not by running into max_tokens."""


class Engine:
    """One GGUF, loaded. Use as a context manager: entering loads, leaving ends the child.

    slots: answers generated at once (continuous batching). They share num_ctx, so that memory does not grow with them.

    Raises:
        EngineError: the GGUF cannot be loaded, a request fails, or the child died.
        MachineError: xllamacpp or libgomp1 is missing.
    """

    def __init__(self, gguf: Path, *, num_ctx: int, threads: int, slots: int = 4) -> None:
        self._gguf, self._num_ctx, self._threads, self._slots = gguf.resolve(), num_ctx, threads, slots

    def __enter__(self) -> Self:
        if not self._gguf.is_file():
            raise EngineError(f"{self._gguf}: no such GGUF; run the stage export first")
        options = {"path": str(self._gguf), "n_ctx": self._num_ctx, "threads": self._threads, "slots": self._slots}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # closed in __exit__
        self._child = subprocess.Popen(
            [sys.executable, "-m", "trainer.backends.llamacpp", json.dumps(options)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for the trainer, which then lets go of the child
        )
        with ExitStack() as stack:
            stack.callback(self._end)
            self._host = self._greeting()
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def pid(self) -> int:
        return self._child.pid

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of a text; turn markers in it are read as such."""
        reply = self._post("/tokenize", {"content": text, "add_special": add_bos, "parse_special": True})
        return [int(number) for number in reply["tokens"]]

    def complete(self, prompt: Sequence[int] | str, max_tokens: int, stop: Sequence[str] = ()) -> Completion:
        """Greedy answer. A text gets <bos> in front. Nothing of earlier prompts is reused: that would change the numbers."""
        reply = self._post(
            "/completion",
            {
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "n_predict": max_tokens,
                "stop": list(stop),
                "temperature": 0.0,
                "top_k": 1,
                "repeat_penalty": 1.0,
                "cache_prompt": False,
                "return_tokens": True,
            },
        )
        return Completion(reply["content"], tuple(reply["tokens"]), reply["stop_type"] in ("eos", "word"))

    def complete_all(self, prompts: Sequence[Sequence[int]], max_tokens: int, done: Callable[[], None] = lambda: None) -> list[Completion]:
        """Greedy answers to many prompts, in order, as many at once as slots and context allow."""
        longest = max((len(prompt) for prompt in prompts), default=0) + max_tokens
        workers = max(1, min(self._slots, self._num_ctx // longest)) if longest else 1
        answers = []
        with ThreadPoolExecutor(workers) as pool:
            for answer in pool.map(lambda prompt: self.complete(prompt, max_tokens), prompts):
                answers.append(answer)
                done()
        return answers

    def next_logprobs(self, ids: Sequence[int], n: int) -> dict[int, float]:
        """The n most likely next tokens and their log-probabilities under the full softmax.

        Asking for one position after the other of the same text is cheap: the common prefix is kept.
        """
        request = {"prompt": list(ids), "n_predict": 1, "n_probs": n, "temperature": 0.0, "cache_prompt": True, "id_slot": 0}
        reply = self._post("/completion", request)
        position = reply["completion_probabilities"][0]
        return {int(entry["id"]): float(entry["logprob"]) for entry in position["top_logprobs"] if entry["logprob"] is not None}

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        connection = http.client.HTTPConnection(self._host, timeout=REQUEST_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(self._obituary(f"llama.cpp did not answer {path} ({type(error).__name__}: {error})")) from error
        finally:
            connection.close()
        if response.status != 200:
            raise EngineError(f"llama.cpp refused {path}: {raw[:300].decode(errors='replace')}")
        return json.loads(raw)

    def _greeting(self) -> str:
        """host:port, which the child says once the model is loaded."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(b'{"trinity"'):
                said = json.loads(line)["trinity"]
                if "missing" in said:
                    raise MachineError(said["missing"])
                if "error" in said:
                    raise EngineError(
                        f"{self._gguf}: llama.cpp cannot load it: {said['error']}; export again. {self._last_words()}".rstrip()
                    )
                return urlsplit(said["address"]).netloc
        raise EngineError(self._obituary(f"{self._gguf}: llama.cpp ended while loading it"))

    def _obituary(self, what: str) -> str:
        try:
            code = self._child.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return f"{what}; its process still runs. {self._last_words()}".rstrip()
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        remedy = (
            "close other programs or take a smaller export.num_ctx"
            if code == -9
            else "export again; if it stays so, the GGUF or this machine's llama.cpp is broken"
        )
        return f"{what}; its process is gone ({how}): {remedy}. {self._last_words()}".rstrip()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return "llama.cpp said: " + " | ".join(lines[-3:]) if lines else ""

    def _end(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._log.close()


def quantizer() -> Callable[[npt.NDArray[np.float32], GGMLQuantizationType], npt.NDArray[np.uint8]]:
    """ggml's row quantiser: rows of float32 [R, C] to rows of bytes [R, bytes a row]. Safe to call from several threads.

    Raises:
        MachineError: xllamacpp or libgomp1 is missing.
    """
    import gguf
    import numpy as np

    chunk = _library().ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer = ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer]

    def quantize(rows: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        assert rows.dtype == np.float32 and rows.flags.c_contiguous and rows.ndim == 2
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        out = np.empty((rows.shape[0], rows.shape[1] // block * block_bytes), np.uint8)
        written = chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1], None)
        assert written == out.nbytes, (kind, written, out.nbytes)
        return out

    return quantize


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(NO_PACKAGE)
    path = next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"), None)
    if path is None:
        raise MachineError(NO_PACKAGE)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineError(_why(str(error))) from error


def _why(message: str) -> str:
    return NO_GOMP if "libgomp" in message else f"llama.cpp's library cannot be loaded: {message}; run make setup"


def _serve(options: Mapping[str, Any]) -> None:
    """The child: load, say where it listens, wait for standard input to close."""
    # Threads that spin while they wait for each other cost a factor of four as soon as anything else runs (measured, 2 cores).
    os.putenv("OMP_WAIT_POLICY", "passive")
    try:
        import xllamacpp
    except ModuleNotFoundError:
        return _say(missing=NO_PACKAGE)
    except ImportError as error:
        return _say(missing=_why(str(error)))
    try:
        server = xllamacpp.Server(_params(xllamacpp, options))
    except RuntimeError as error:
        return _say(error=str(error))
    _say(address=server.listening_address)
    sys.stdin.buffer.read()
    # The server's own threads would hold up an orderly exit.
    os._exit(0)


def _params(xllamacpp: Any, options: Mapping[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = options["path"]
    params.n_ctx = options["n_ctx"]
    params.n_parallel = options["slots"]
    params.kv_unified = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.port = 0
    params.verbosity = 1
    params.warmup = params.ui = params.fit_params = False
    params.use_jinja = params.enable_chat_template = False
    params.cache_ram_mib = 0
    params.no_extra_bufts = True  # repacked weights would be a second copy of the model in memory
    return params


def _say(**what: str) -> None:
    print(json.dumps({"trinity": what}), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
