from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import gemma3
from trainer.config import Config, Model, load
from trainer.errors import DoesNotFitError, ModelError
from trainer.facts import PlanFacts
from trainer.stages import plan
from trainer.worker import Job


def run(cfg: Config, out: Path) -> PlanFacts:
    return plan.run(cfg, Job(stage="plan", config=cfg, inputs={}, out=out), out)


def test_the_stock_layer_does_not_fit_a_t4_and_the_refusal_says_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        run(load("gemma3-12b-t4", ["kernels.layer=stock"]), tmp_path)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "needs 18.39 GB, the T4 has 15.83 GB, 2.56 GB are missing" in message
    assert "attention scores, 4.29 GB (data.max_tokens)" in message
    assert "--set kernels.layer=ours" in message
    assert "--set data.max_tokens=2304" in message
    written = json.loads((tmp_path / "plan.json").read_text())
    assert not written["fits"]
    assert [way["setting"] for way in written["remedies"]][:2] == ["kernels.layer=ours", "data.max_tokens=2304"]
    assert "attention scores                 4.29 GB  ██" in capsys.readouterr().out


@pytest.mark.parametrize("remedy", ["kernels.layer=ours", "data.max_tokens=2304"])
def test_it_fits_once_a_remedy_is_taken(remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = run(load("gemma3-12b-t4", ["kernels.layer=stock", remedy]), tmp_path)
    assert facts.fits
    assert "fits: " in capsys.readouterr().out


def ours(*overrides: str) -> Config:
    nothing = ["kernels.layer=ours", "kernels.keep_bytes=0", "kernels.keep_pinned_bytes=0", "export.num_ctx=65536"]
    return load("gemma3-12b-t4", [*nothing, *overrides])


def test_with_our_layer_the_plan_says_what_is_pinned_kept_and_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = run(ours("kernels.keep_bytes=2_000_000_000", "kernels.keep_pinned_bytes=1_000_000_000"), tmp_path)
    said = capsys.readouterr().out
    assert facts.fits
    assert facts.pinned_bytes == 48 * 2 * 4096 * 3840 + 31 * 2 * 4096 * 3840
    assert "pinned in the host's memory: 2.49 GB of the 12.70 GB" in said
    assert "on the card down of 48 layers, o of 15 layers; pinned o of 31 layers" in said
    assert "estimated: 12.1 s for a pass of 4096 tokens" in said
    assert "kernels.keep_bytes=3200000000 fits too" in said
    assert "warning" not in said


def test_much_pinned_memory_is_warned_of_with_what_pins_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = run(ours("data.max_tokens=20480"), tmp_path)
    said = capsys.readouterr().out
    assert facts.fits
    assert "warning: more than 6.50 GB pinned" in said
    assert "--set kernels.span_layers=2 " in said


def test_more_pinned_memory_than_the_machine_has_is_refused_unless_it_is_another_machine(tmp_path: Path) -> None:
    too_much = ours("kernels.keep_pinned_bytes=12_000_000_000")
    with pytest.raises(DoesNotFitError, match=r"13\.31 GB of pinned memory, and a machine with a T4 has 12\.70 GB") as caught:
        run(too_much, tmp_path)
    assert "--set kernels.keep_pinned_bytes=5000000000 " in str(caught.value)
    assert run(ours("kernels.keep_pinned_bytes=12_000_000_000", "plan.vram_gb=15.8"), tmp_path).fits


def test_terms_sum_to_what_is_needed_and_plan_json_holds_the_facts(tmp_path: Path) -> None:
    facts = run(load("tiny"), tmp_path)
    assert sum(facts.terms.values()) == facts.needed_bytes
    written = json.loads((tmp_path / "plan.json").read_text())
    assert {name: written[name] for name in PlanFacts.model_fields} == facts.model_dump()


def test_a_directory_is_read_and_is_a_source_of_the_plan(tmp_path: Path) -> None:
    config_json = tmp_path / "config.json"
    config_json.write_text(json.dumps(gemma3.SIZES["1b"].to_config("bfloat16")))
    cfg = load("gemma3-270m-cpu", [f"model.name={tmp_path}"])
    assert plan.model_size(cfg.model) == gemma3.SIZES["1b"]
    assert plan.sources(cfg) == {"model": config_json}
    assert plan.download_bytes(cfg.model, gemma3.SIZES["1b"]) == 0
    assert plan.sources(load("tiny")) == {}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("unsloth/gemma-3-12b-it", "12b"),
        ("google/gemma-3-4b-pt", "4b"),
        ("unsloth/gemma-3-27b-it-bnb-4bit", "27b"),
        ("google/gemma-3-1b-it", "1b"),
        ("embedded:gemma-3-270m", "270m"),
        ("random:tiny", "tiny"),
    ],
)
def test_names_say_their_size_without_a_network(name: str, size: str) -> None:
    assert plan.model_size(Model(name=name)) == gemma3.SIZES[size]


def test_a_name_that_says_no_size_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelError, match=r"'me/my-model'.*name its directory"):
        plan.model_size(Model(name="me/my-model"))


def test_the_download_counts_the_vision_tower_of_the_multimodal_sizes() -> None:
    twelve = plan.download_bytes(Model(), gemma3.SIZES["12b"])
    assert twelve == pytest.approx(24.37e9, rel=0.001)
    assert plan.download_bytes(Model(name="google/gemma-3-1b-it"), gemma3.SIZES["1b"]) == 2 * gemma3.SIZES["1b"].num_parameters


def test_a_containers_limit_is_the_machines_memory(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    assert plan.host_bytes(limit) > 0
    limit.write_text("1000000000\n")
    assert plan.host_bytes(limit) == 1_000_000_000
    limit.write_text("max\n")
    assert plan.host_bytes(limit) == plan.host_bytes(tmp_path / "absent")


def test_planning_imports_nothing_heavy() -> None:
    """It takes half a second for that reason; a second of a busy machine would say less."""
    script = (
        "import sys, tempfile, pathlib; from trainer.config import load; from trainer.stages import plan;"
        "[plan.run(load(name), None, pathlib.Path(tempfile.mkdtemp())) for name in ('tiny', 'gemma3-12b-t4')];"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'gguf', 'tokenizers', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_plan_json_explains_every_term_and_says_what_was_printed(tmp_path: Path) -> None:
    facts = run(load("gemma3-12b-t4"), tmp_path)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert {one["term"]: one["bytes"] for one in written["explained"]} == facts.terms
    assert all(one["formula"] and one["source"] for one in written["explained"])
    assert sum(written["groups"].values()) == facts.needed_bytes
    assert written["reserved_bytes"] + facts.terms["CUDA context"] == facts.needed_bytes, "the verdict goes by them"
    assert written["headroom_bytes"] == facts.available_bytes - facts.needed_bytes > 0
    assert written["largest"]["tokens"] >= 16_384
    assert set(written["times_s"]) == {"download", "quantise", "load", "train", "evaluate", "export", "verify"}
    assert set(written["disk_bytes"]) == {"download", "NF4 state", "train", "export"}
    assert set(written["memory_bytes"]) == {"quantise", "train", "export", "verify"}
    assert written["mirror_bytes"] > 2 * written["checkpoint_bytes"]


def test_the_table_sets_the_groups_beside_the_early_claim_and_the_lines_below_say_how_far_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(load("gemma3-12b-t4"), tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"weights +7\.57 GB +7\.60 GB", said)
    assert re.search(r"gradients and optimizer +2\.71 GB +5\.50 GB", said)
    assert re.search(r"up to \d+ tokens, or rank \d+; up to 2\d{4} tokens with kernels", said)
    assert re.search(r"download +8 min 08 s +24\.38 GB", said)
    assert "not measured" in said
    run(load("gemma3-12b-t4", ["model.name=google/gemma-3-4b-it"]), tmp_path)
    assert "early recipes" not in capsys.readouterr().out, "they speak of the 12B"


def test_times_of_a_run_follow_the_data_where_it_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "records.json"
    data.write_text("x" * 4 * 2_000_000)
    run(load("gemma3-12b-t4", [f"data.path={data}"]), tmp_path)
    twice = json.loads((tmp_path / "plan.json").read_text())["times_s"]["train"]
    assert "about 2000000 tokens" in capsys.readouterr().out
    run(load("gemma3-12b-t4", [f"data.path={tmp_path / 'absent.json'}"]), tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["times_s"]["train"] == pytest.approx(twice / 2)
    assert "each million tokens of data" in capsys.readouterr().out


@pytest.mark.parametrize(("setting", "has"), [("plan.card=A10", "the A10 has"), ("plan.vram_gb=24", "the card with 24 GB has")])
def test_another_card_is_planned_for_by_name_or_by_memory(
    setting: str, has: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(load("gemma3-12b-t4", [setting]), tmp_path).fits
    assert has in capsys.readouterr().out


@pytest.mark.parametrize(("name", "fits"), [("270m", True), ("1b", True), ("4b", True), ("12b", True), ("27b", False)])
def test_every_size_is_planned_for(name: str, fits: bool, tmp_path: Path) -> None:
    cfg = load("gemma3-12b-t4", [f"model.name=google/gemma-3-{name}-it"])
    if fits:
        assert run(cfg, tmp_path).fits
        return
    with pytest.raises(DoesNotFitError, match="does not fit"):
        run(cfg, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["headroom_bytes"] < 0


def test_the_mirrors_size_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(load("gemma3-12b-t4"), tmp_path)
    assert "the mirror" not in capsys.readouterr().out
    run(load("gemma3-12b-t4", ["checkpoint.mirror=/content/drive/MyDrive/trinity"]), tmp_path)
    assert "the mirror in /content/drive/MyDrive/trinity: 5." in capsys.readouterr().out
