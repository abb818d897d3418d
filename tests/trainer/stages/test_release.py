"""release: one directory with everything a server needs, named by its content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from trainer import artifacts
from trainer.artifacts import Hashes, Label
from trainer.facts import TrainFacts, VerifyFacts
from trainer.manifest import Manifest, Probe
from trainer.stages import release, verify


@pytest.fixture(scope="module")
def inputs(chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    verified, train = tmp_path_factory.mktemp("verify"), tmp_path_factory.mktemp("runs") / "train"
    facts = verify.run(chain.cfg, chain.inputs, verified)
    label = Label(stage="train", version=1, sections={}, sources={}, inputs={})
    with artifacts.publish(train, label, Hashes(train.parent / "hashes.json")) as draft:
        draft.facts = chain.inputs.facts(TrainFacts)
    directories = {**chain.inputs.directories, "verify": verified, "train": train}
    return chain.inputs._replace(directories=directories, known={**chain.inputs.known, VerifyFacts: facts})


def test_a_release_is_whole_and_says_so(chain: Any, inputs: Any, tmp_path: Path) -> None:
    facts = release.run(chain.cfg, inputs, tmp_path)
    text = (tmp_path / "manifest.json").read_bytes()
    manifest = Manifest.model_validate_json(text)
    assert facts.release == manifest.release and hashlib.sha256(text).hexdigest() == facts.manifest_sha256
    assert facts.directory == chain.cfg.paths.output / "gguf" / manifest.release
    assert manifest.release.startswith("tiny-") and len(manifest.release) == len("tiny-") + 12
    for file in manifest.files.values():
        data = (tmp_path / file.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.num_bytes, file.sha256)
    assert (tmp_path / chain.facts.gguf).samefile(chain.export / chain.facts.gguf), "a hard link where the disk can"
    assert manifest.parity.verified and manifest.adapter.rslora and manifest.base.weights_sha256 == chain.facts.base_sha256
    assert "Gemma Terms of Use" in manifest.licences[0].notice
    assert "ai.google.dev/gemma/terms" in (tmp_path / "LICENSES.txt").read_text(encoding="utf-8")
    probes = (tmp_path / manifest.files["probes"].path).read_text(encoding="utf-8").split("\n")
    assert len([Probe.model_validate_json(line) for line in probes if line]) >= 3


def test_an_equal_release_has_an_equal_name_and_a_changed_one_another(chain: Any, inputs: Any, tmp_path: Path) -> None:
    names = []
    for number, cfg in enumerate(
        (chain.cfg, chain.cfg, chain.cfg.model_copy(update={"export": chain.cfg.export.model_copy(update={"num_ctx": 300})}))
    ):
        (tmp_path / str(number)).mkdir()
        names.append(release.run(cfg, inputs, tmp_path / str(number)).release)
    assert names[0] == names[1] != names[2]


def test_a_waived_limit_stands_in_the_manifest(chain: Any, inputs: Any, tmp_path: Path) -> None:
    from trainer.facts import Refusal

    waived = inputs.facts(VerifyFacts).model_copy(
        update={"verified": False, "waived": (Refusal(link="kl", message="0.5 nats (limit 0.1)"),)}
    )
    release.run(chain.cfg, inputs._replace(known={**inputs.known, VerifyFacts: waived}), tmp_path)
    parity = Manifest.model_validate_json((tmp_path / "manifest.json").read_bytes()).parity
    assert not parity.verified and parity.waived[0].message == "0.5 nats (limit 0.1)"
