"""notebooks/colab_t4.ipynb from top to bottom on a CPU, as a browser would run it, and then on a laptop what its last line says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import nbformat
import pytest
from nbclient import NotebookClient

from tests.server.real import ROOT, clean_environment, free_port

pytestmark = [
    pytest.mark.e2e,
    # jupyter_client's and ipykernel's own, at the end of a kernel
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NOTEBOOK = ROOT / "notebooks" / "colab_t4.ipynb"
FEW = {
    "train.max_steps": 20,
    "train.tokens_per_step": 60,
    "train.batch_records": 4,
    "train.valid_records": 4,
    "evaluate.max_records": 4,
    "evaluate.reference_records": 3,
    "evaluate.max_new_tokens": 4,
    "export.sampling.num_predict": 16,
    "verify.minutes": 0.2,
}
"""As little as teaches the model to say Yes and to end there, without which no engine serves it: the notebook is what is tested here."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(place: Path) -> Any:
    """The notebook with its outputs. papermill's way: a cell behind the one that is tagged `parameters` sets others."""
    book = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    turns = [[{"role": "user", "content": f"Is {n} a number?"}, {"role": "assistant", "content": "Yes."}] for n in range(80)]
    data = place / "mine.jsonl"
    data.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns), encoding="utf-8")
    values = {
        "SOURCE": str(ROOT),
        "PRESET": "gemma3-270m-cpu",
        "DATA": str(data),
        "SETTINGS": " ".join(f"--set {name}={value}" for name, value in FEW.items()),
        "OUTPUT": str(place / "output"),
        "KEEP": str(place / "kept"),
        "QUESTIONS": ["Is 81 a number?"],
    }
    at = next(number for number, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
    injected = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(injected))  # type: ignore[no-untyped-call]
    client = NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    try:  # one thread: two that wait for each other beside other busy processes take several times as long
        return client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    finally:
        nbformat.write(book, place / "executed.ipynb")  # type: ignore[no-untyped-call]


def said(book: Any, cell: str) -> str:
    """What a cell shows, as text."""
    outputs = next(one for one in book.cells if one.id == cell).outputs
    return "".join(output.text if output.output_type == "stream" else output.data["text/plain"] + "\n" for output in outputs)


def test_the_notebook_is_committed_without_outputs() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert max(len(cell["source"]) for cell in cells) < 50


def test_it_trains_measures_and_releases_and_a_task_is_one_line(executed: Any, place: Path) -> None:
    assert "fits" in said(executed, "plan") and "ready for gemma3-270m-cpu" in said(executed, "doctor")
    trained = said(executed, "train")
    assert "20 of 20 steps (100 %)" in trained and trained.count(" of 20 steps") <= 2, "one line before the mirror's and one after"
    assert "report: done" in said(executed, "release")
    shown = next(cell for cell in executed.cells if cell.id == "report").outputs[0].data["text/html"]
    assert "&lt;html" in shown
    assert list((place / "kept").glob("*/a.json")), "a checkpoint lies where it outlives the machine"
    assert "\n> Is 81 a number?\nYes.\n" in said(executed, "chat")
    texts = [output.get("text", "") for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [text for text in texts if "\r" in text or "Warning" in text or "Traceback" in text]


@pytest.fixture
def laptop(executed: Any, place: Path, tmp_path: Path) -> Iterator[str]:
    """The last cell's line, typed as it stands where the archive lies in ~/Downloads; yields the address that it serves."""
    home, port = tmp_path / "home", free_port()
    downloads = home / "Downloads"
    downloads.mkdir(parents=True)
    shutil.copy(next((place / "kept").glob("*.tar")), downloads)
    real = Path.home()
    more = {"HOME": str(home), "TRINITY_PORT": str(port), "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR") or str(real / ".cache" / "uv")}
    if (real / ".gitconfig").is_file():
        more["GIT_CONFIG_GLOBAL"] = str(real / ".gitconfig")
    log = tmp_path / "log"
    with log.open("w") as lines:
        line = said(executed, "laptop").strip()
        typed = ["bash", "-c", line]
        process = subprocess.Popen(typed, cwd=home, env=clean_environment(**more), stdout=lines, stderr=lines, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        print(log.read_text(encoding="utf-8"))


def test_the_last_line_serves_the_file_on_a_laptop(laptop: str, place: Path) -> None:
    manifest = json.loads((place / "output" / "gguf" / "current" / "manifest.json").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 300
    ready: dict[str, Any] = {}
    while "model" not in ready and time.monotonic() < deadline:
        try:
            ready = httpx2.get(f"{laptop}/readyz", trust_env=False).json()
        except httpx2.TransportError:
            time.sleep(0.5)
    assert ready.get("model") == f"{manifest['name']}:{manifest['release']}", ready
    probe = json.loads((place / "output" / "gguf" / "current" / "probes.jsonl").read_text(encoding="utf-8").splitlines()[0])
    body = {"messages": probe["messages"], "temperature": 0}
    reply = httpx2.post(f"{laptop}/chat", json=body, timeout=120, trust_env=False).json()
    assert reply["message"]["content"] == probe["answer"] == "Yes."
