"""release: the verified GGUF with everything that a server must know about it, as one directory that never changes.

The pipeline shows it as output/gguf/<release>/ and moves the link `current` to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from trainer import __version__, artifacts, terms
from trainer.artifacts import Inputs
from trainer.config import Config
from trainer.errors import ArtifactError
from trainer.facts import EvaluateFacts, ExportFacts, ReleaseFacts, TrainFacts, VerifyFacts
from trainer.manifest import AsTrained, Base, File, Manifest, Parity, Prompt, Scores, Waived

VERSION = 1


def sources(cfg: Config) -> Mapping[str, Path]:
    return {}


def run(cfg: Config, inputs: Inputs, out: Path) -> ReleaseFacts:
    exported = inputs.facts(ExportFacts)
    gguf, source = inputs.path("export") / exported.gguf, inputs.path("export") / "Modelfile"
    probes = inputs.path("verify") / "probes.jsonl"
    files = {path.name: _file(path) for path in (source, probes)}
    files[exported.gguf] = File(path=exported.gguf, num_bytes=exported.gguf_bytes, sha256=exported.gguf_sha256)
    manifest = _named(_manifest(cfg, inputs, files), cfg.run.name)
    for path in (gguf, source, probes):
        artifacts.link_or_copy(path, out / path.name)
    (out / "LICENSES.txt").write_text(terms.text((terms.GEMMA, terms.MIT)), encoding="utf-8")
    text = manifest.model_dump_json(indent=2) + "\n"
    # Last, and flushed with the directory: a server takes what has a manifest for whole.
    artifacts.write_whole(out / "manifest.json", text.encode())
    return ReleaseFacts(
        release=manifest.release,
        directory=cfg.paths.output / "gguf" / manifest.release,
        manifest_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _manifest(cfg: Config, inputs: Inputs, files: Mapping[str, File]) -> Manifest:
    exported = inputs.facts(ExportFacts)
    return Manifest(
        schema_version=1,
        name=cfg.export.name,
        release="",
        created=datetime.now(UTC),
        trainer_version=__version__,
        base=Base(name=cfg.model.name, revision=exported.base_revision, weights_sha256=exported.base_sha256),
        adapter=_as_trained(inputs),
        quantization=exported.quantization,
        files={"gguf": files[exported.gguf], "modelfile": files["Modelfile"], "probes": files["probes.jsonl"]},
        prompt=_prompt(cfg),
        scores=_scores(inputs.facts(EvaluateFacts), inputs.facts(VerifyFacts)),
        parity=_parity(inputs.facts(VerifyFacts)),
        licences=(terms.GEMMA, terms.MIT),
    )


def _named(manifest: Manifest, run: str) -> Manifest:
    """The same with its name, `<run>-<sha12>`: over the content but for the time, so that an equal release gets an equal name."""
    content = manifest.model_dump_json(exclude={"release", "created"})
    digest = hashlib.sha256(content.encode()).hexdigest()
    return manifest.model_copy(update={"release": f"{run}-{digest[:12]}"})


def _prompt(cfg: Config) -> Prompt:
    from trainer.dataset import template
    from trainer.gguf import modelfile

    return modelfile.prompt(cfg.export, template.REWRITE, template.STRIP)


def _as_trained(inputs: Inputs) -> AsTrained:
    trained = inputs.facts(TrainFacts)
    label = artifacts.read_label(inputs.path("train"))
    if label is None:
        raise ArtifactError(f"{inputs.path('train')}: no such artefact; run the stage train first")
    return AsTrained(
        key=label.key,
        rank=trained.rank,
        alpha=trained.alpha,
        dora=trained.dora,
        rslora=trained.rslora,
        max_tokens=trained.max_tokens,
        rungs=trained.rungs,
    )


def _scores(evaluated: EvaluateFacts, verified: VerifyFacts) -> Scores:
    return Scores(
        num_records=evaluated.num_records,
        loss_base=evaluated.loss_base,
        loss_tuned=evaluated.loss_tuned,
        exact_match_base=evaluated.exact_match_base,
        exact_match_tuned=evaluated.exact_match_tuned,
        exact_match_served=verified.exact_match_served,
    )


def _parity(verified: VerifyFacts) -> Parity:
    names = ("verified", "num_prompts", "ids_equal", "num_positions", "kl_nats", "top1_agreement", "max_kl_nats", "min_top1")
    waived = tuple(Waived(link=refusal.link, message=refusal.message) for refusal in verified.waived)
    return Parity(**{name: getattr(verified, name) for name in names}, waived=waived)


def _file(path: Path) -> File:
    data = path.read_bytes()
    return File(path=path.name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
