"""verify: a sound GGUF passes, and every way of breaking the chain that others have met is refused with its numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trainer.errors import ArtifactError, ModelError, RefusedError
from trainer.facts import EvaluateFacts, ExportFacts, VerifyFacts
from trainer.manifest import Probe
from trainer.stages import export, verify
from trainer.stages.verify import Asked


@pytest.fixture(scope="module")
def sound(chain: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[VerifyFacts, Path]:
    out = tmp_path_factory.mktemp("verify")
    return verify.run(chain.cfg, chain.inputs, out), out


def strict(chain: Any, sound: tuple[VerifyFacts, Path], **verify_section: Any) -> Any:
    """The limit that a preset gets: 1.5 times what a sound export measures."""
    limits = chain.cfg.verify.model_copy(update={"max_kl_nats": 1.5 * sound[0].kl_nats, **verify_section})
    return chain.cfg.model_copy(update={"verify": limits})


def exported_again(chain: Any, tmp_path: Path, sabotage: Callable[[Path], None]) -> Any:
    """Inputs with an export of a copy of the adapter that was tampered with."""
    train, out = tmp_path / "train", tmp_path / "export"
    shutil.copytree(chain.inputs.path("train"), train)
    sabotage(train / "best")
    out.mkdir()
    inputs = chain.inputs._replace(directories={**chain.inputs.directories, "train": train, "export": out})
    facts = export.run(chain.cfg, inputs, out)
    return inputs._replace(known={**inputs.known, ExportFacts: facts})


def alpha_over_r(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"use_rslora": False}), encoding="utf-8")


def without_magnitudes(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"use_dora": False}), encoding="utf-8")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "magnitude" not in name}, adapter / "adapter_model.safetensors")


def test_a_sound_export_passes_and_is_measured(chain: Any, sound: tuple[VerifyFacts, Path]) -> None:
    facts, out = sound
    assert facts.verified and not facts.waived
    assert facts.ids_equal == 1.0 and facts.num_prompts == 8 and facts.num_answers == 8
    assert facts.num_positions == len(np.load(chain.inputs.path("evaluate") / "reference" / "logprobs.npz")["record"])
    assert facts.kl_nats < 0.05
    assert len(facts.served_answers) == len(chain.inputs.facts(EvaluateFacts).answers)
    probes = [Probe.model_validate_json(line) for line in (out / "probes.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert len(probes) >= 3 and all(probe.prompt_ids[0] == 2 for probe in probes)
    assert len((out / "served.jsonl").read_text(encoding="utf-8").splitlines()) == 8


@pytest.mark.parametrize("sabotage", [alpha_over_r, without_magnitudes])
def test_a_wrong_merge_is_refused_with_both_numbers(
    chain: Any, sound: tuple[VerifyFacts, Path], tmp_path: Path, sabotage: Callable[[Path], None]
) -> None:
    inputs = exported_again(chain, tmp_path, sabotage)
    (tmp_path / "verify").mkdir()
    cfg = strict(chain, sound)
    with pytest.raises(RefusedError, match=r"kl: mean KL.* nats over \d+ positions \(limit 0\.\d+\)") as caught:
        verify.run(cfg, inputs, tmp_path / "verify")
    assert caught.value.exit_code == 3
    assert (inputs.path("export") / "Modelfile").is_file() and str(inputs.path("export")) in str(caught.value)


def test_the_limit_of_the_sabotages_lets_a_sound_export_pass(chain: Any, sound: tuple[VerifyFacts, Path], tmp_path: Path) -> None:
    assert verify.run(strict(chain, sound), chain.inputs, tmp_path).verified


def test_over_the_limit_with_kl_warn_it_passes_unverified(chain: Any, sound: tuple[VerifyFacts, Path], tmp_path: Path) -> None:
    facts = verify.run(strict(chain, sound, max_kl_nats=1e-9, kl="warn"), chain.inputs, tmp_path)
    assert not facts.verified
    assert [refusal.link for refusal in facts.waived] == ["kl"]


def test_prompts_read_by_transformers_tokenizer_are_refused_even_with_kl_warn(
    chain: Any, sound: tuple[VerifyFacts, Path], tmp_path: Path
) -> None:
    theirs = transformers_reading(chain.export / chain.facts.gguf)
    inputs = with_answers(chain, tmp_path, lambda line: line | {"prompt_ids": [2, *theirs(line["prompt"])]})
    (tmp_path / "verify").mkdir()
    with pytest.raises(RefusedError, match=r"tokens: .* for [1-8] of 8 prompts") as caught:
        verify.run(strict(chain, sound, kl="warn"), inputs, tmp_path / "verify")
    assert "run again from prepare" in str(caught.value)


def test_a_gguf_is_not_written_from_transformers_reading_of_the_tokenizer(chain: Any, tmp_path: Path) -> None:
    from trainer.gguf import vocabulary

    reading = transformers_reading(chain.export / chain.facts.gguf)
    reading.tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="a Unigram tokenizer; Gemma 3's is BPE with byte fallback"):
        vocabulary.read(tmp_path / "tokenizer.json", 640)


def test_one_changed_byte_is_refused_before_anything_is_loaded(chain: Any, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(chain.export, folder)
    with (folder / chain.facts.gguf).open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    inputs = chain.inputs._replace(directories={**chain.inputs.directories, "export": folder})
    with pytest.raises(RefusedError, match=r"hash: .* is not the file that export wrote"):
        verify.run(chain.cfg, inputs, tmp_path)


def test_all_failed_links_are_named_at_once() -> None:
    asked = [Asked("a", [], "hello", [2], "", [5, 106])] * 4
    facts = some_facts(kl_nats=0.5, top1_agreement=0.2, ends=0.5, ids_equal=0.75)
    assert [refusal.link for refusal in verify.refusals(facts, asked, asked[:1])] == ["tokens", "stop", "kl", "top1"]


def test_answers_need_not_end_where_the_tuned_model_did_not() -> None:
    asked = [Asked("a", [], "hello", [2], "", [5])] * 4
    assert verify.refusals(some_facts(ends=0.0), asked, []) == []


def test_the_sample_follows_the_time() -> None:
    costs = [10, 10, 10, 20, 50, 50]
    assert verify.affordable(costs, 0.001, 60) == 6
    assert verify.affordable(costs, 1.0, 60) == 4
    assert verify.affordable(costs, 1000.0, 60) == 3
    assert verify.affordable(costs, 1000.0, 60, least=0) == 0


def test_a_short_bound_on_the_time_still_measures_three(chain: Any, tmp_path: Path) -> None:
    cfg = chain.cfg.model_copy(update={"verify": chain.cfg.verify.model_copy(update={"minutes": 1e-4})})
    facts = verify.run(cfg, chain.inputs, tmp_path)
    assert facts.num_answers == 3
    assert facts.num_positions < 48
    assert len((tmp_path / "probes.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_too_few_answers_of_the_tuned_model_are_one_clear_error(chain: Any, tmp_path: Path) -> None:
    inputs = with_answers(chain, tmp_path, lambda line: line | {"tuned_ids": []})
    with pytest.raises(ArtifactError, match="fewer than 3 records with answers of the tuned model"):
        verify.run(chain.cfg, inputs, tmp_path)


def some_facts(**figures: Any) -> VerifyFacts:
    sound: dict[str, Any] = {
        "num_prompts": 4, "ids_equal": 1.0, "num_positions": 10, "kl_nats": 0.01, "top1_agreement": 1.0, "max_kl_nats": 0.1, "min_top1": 0.9,
        "ends": 1.0, "num_answers": 4, "exact_match_served": None, "served_answers": (), "verified": True, "wall_s": 1.0,
    }  # fmt: skip
    return VerifyFacts(**(sound | figures))


def with_answers(chain: Any, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    folder = tmp_path / "evaluate"
    shutil.copytree(chain.inputs.path("evaluate"), folder)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    (folder / "answers.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines), encoding="utf-8")
    return chain.inputs._replace(directories={**chain.inputs.directories, "evaluate": folder})


class transformers_reading:  # noqa: N801  # a function with a memory
    """What transformers makes of a GGUF's vocabulary: Unigram, silently."""

    def __init__(self, gguf: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).backend_tokenizer

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
