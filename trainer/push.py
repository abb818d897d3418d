"""`python -m trainer push OWNER/NAME --preset P`: a run's release, or its adapter, on the Hugging Face hub with a model card.

Only what `release` published is pushed, so what verify refused never is, and what was waived stands in the card. Every file is
listed with its size before anything is sent. A new repository is private unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from trainer import artifacts, model_card, progress, terms
from trainer.artifacts import Artifact, Hashes
from trainer.config import Config, load, presets
from trainer.errors import ArtifactError
from trainer.facts import ExportFacts, Facts, PrepareFacts, ReleaseFacts, TrainFacts
from trainer.manifest import Manifest
from trainer.model_card import Run, What

F = TypeVar("F", bound=Facts)
Files = Mapping[str, Path | bytes]

TERMS = "GEMMA_TERMS.txt"
"""A copy of Gemma's terms, which they ask whoever passes a model on to give with it. Trinity has none: their text is Google's."""


def main(arguments: Sequence[str]) -> None:
    """Raises TrainerError: nothing to push, or the hub does not take it."""
    from trainer.backends import upload

    options = parser().parse_args(arguments)
    cfg = load(options.preset, options.set)
    what: What = options.what
    repository: str = options.repository
    upload.check_name(repository)
    run, files = contents(cfg, repository, what)
    if options.terms:
        files = {**files, TERMS: _terms(options.terms)}
    progress.say(listing(repository, files, public=options.public))
    if not options.dry_run:
        print(upload.send(repository, files, private=not options.public, message=f"{run.manifest.release}: {what}"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m trainer push", description="Put a run's release, or its adapter, on the Hugging Face hub."
    )
    made.add_argument("repository", metavar="OWNER/NAME", help="made where it is not there")
    made.add_argument("--preset", required=True, help=f"one of {', '.join(presets())}, or the path of a .toml")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as it was trained; run.name, paths.output")
    made.add_argument("--what", choices=("gguf", "adapter"), default="gguf", help="the release with its GGUF, or PEFT's adapter alone")
    made.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    made.add_argument("--terms", type=Path, metavar="FILE", help=f"your copy of {terms.GEMMA.url}, sent along as {TERMS}")
    made.add_argument("--dry-run", action="store_true", help="list what would be sent, and ask nobody")
    return made


def contents(cfg: Config, repository: str, what: What) -> tuple[Run, Files]:
    """What stands behind the release, and the files by their names in the repository.

    Raises:
        ArtifactError: no release yet, or not whole.
    """
    hashes = Hashes(cfg.paths.cache / "hashes.json")
    with artifacts.lock(cfg.run_dir):
        artifacts.recover(cfg.run_dir)
        release = _published(cfg, ReleaseFacts, hashes).path
        run = Run(
            Manifest.model_validate_json((release / "manifest.json").read_bytes()),
            _published(cfg, PrepareFacts, hashes).facts,
            (trained := _published(cfg, TrainFacts, hashes)).facts,
            _published(cfg, ExportFacts, hashes).facts,
            cfg.model.double_quant,
        )
    if run.manifest.adapter.key != trained.key:
        raise ArtifactError(f"{release} was made of another training than {trained.path}: run `python -m trainer release` again")
    files = (
        _release(release, run)
        if what == "gguf"
        else _adapter(trained.path / ("best" if cfg.export.checkpoint == "best" else "adapter"), run)
    )
    return run, {
        **files,
        "README.md": model_card.card(run, repository, what).encode(),
        "LICENSES.txt": terms.text(model_card.licences(run, what)).encode(),
    }


def _published(cfg: Config, kind: type[F], hashes: Hashes) -> Artifact[F]:
    stage = kind.__name__.removesuffix("Facts").lower()
    found = artifacts.read(cfg.run_dir / stage, kind, hashes)
    if found is None:
        raise ArtifactError(f"{cfg.run_dir / stage} is not there: run the whole way first (make train), with the same preset and run.name")
    return found


def _release(release: Path, run: Run) -> Files:
    """The release as it is, and its template and parameters once more under the names that Ollama reads on the hub."""
    prompt = run.manifest.prompt
    parameters = {"stop": prompt.stop, "num_ctx": prompt.num_ctx, **prompt.sampling.model_dump()}
    files = {file.path: release / file.path for file in run.manifest.files.values()}
    made = {"template": prompt.template.encode(), "params": (json.dumps(parameters, indent=1) + "\n").encode()}
    return {**files, "manifest.json": release / "manifest.json", **made}


def _adapter(folder: Path, run: Run) -> Files:
    """PEFT's two files; the base under its name on the hub."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = run.base or config["base_model_name_or_path"]
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {"adapter_config.json": text.encode(), "adapter_model.safetensors": folder / "adapter_model.safetensors"}


def _terms(path: Path) -> Path:
    if not path.is_file() or not path.stat().st_size:
        raise ArtifactError(f"--terms {path}: no such file, or an empty one; save the text of {terms.GEMMA.url} there")
    return path


def listing(repository: str, files: Files, *, public: bool) -> str:
    sizes = {name: len(source) if isinstance(source, bytes) else source.stat().st_size for name, source in sorted(files.items())}
    lines = [f"push: {repository} ({'PUBLIC' if public else 'private'}), {sum(sizes.values()) / 1e6:,.1f} MB in {len(sizes)} files"]
    lines += [f"  {num_bytes / 1e6:10,.3f} MB  {name}" for name, num_bytes in sizes.items()]
    if public and "probes.jsonl" in sizes:
        lines.append(
            "  probes.jsonl and manifest.json can be read by everybody; the first holds some of your held-out questions and their answers"
        )
    if public and TERMS not in sizes:
        lines.append(f"  Gemma's terms ask you to give a copy of them along: save {terms.GEMMA.url} as text, and name it with --terms FILE")
    return "\n".join(lines)
