from __future__ import annotations

import pytest

from trainer.config import load
from trainer.gemma3 import SIZES
from trainer.planner import terms
from trainer.planner.budget import budget

KEEPING = ["kernels.keep_bytes=2_000_000_000", "kernels.keep_pinned_bytes=12_000_000_000"]


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("gemma3-12b-t4", []),
        ("gemma3-12b-t4", KEEPING),
        ("gemma3-12b-t4", ["kernels.layer=stock"]),
        ("gemma3-12b-t4", ["kernels.layer=stock", "data.max_tokens=256"]),
        ("gemma3-12b-t4", ["kernels.layer=stock", "train.gradient_checkpointing=false"]),
        ("gemma3-12b-t4", ["kernels.offload=stock", "kernels.loss=stock"]),
        ("gemma3-12b-t4", ["kernels.pin_gradients=true", "data.max_tokens=512"]),
        ("gemma3-12b-t4", ["kernels.pin_gradients=true", "data.max_tokens=16384", "export.num_ctx=16384"]),
        ("gemma3-270m-cpu", []),
        ("tiny", []),
    ],
)
def test_every_term_of_every_budget_has_a_group_a_formula_and_a_source(preset: str, overrides: list[str]) -> None:
    cfg = load(preset, overrides)
    found = budget(cfg, SIZES["tiny" if preset == "tiny" else "270m" if "270m" in preset else "12b"])
    told = terms.explained(found.terms)
    assert [one["term"] for one in told] == list(found.terms)
    assert all(one["formula"] and one["source"] for one in told)
    assert sum(terms.grouped(found.terms).values()) == found.needed_bytes


def test_the_groups_stand_beside_what_early_recipes_claim() -> None:
    """Weights as claimed; an adapter with 8-bit state takes half of what is claimed for it; what is left buys speed."""
    groups = terms.grouped(budget(load("gemma3-12b-t4"), SIZES["12b"]).terms)
    assert sum(terms.CLAIM.values()) == 15_600_000_000
    assert groups["weights"] == pytest.approx(terms.CLAIM["weights"], rel=0.005)
    assert groups["gradients and optimizer"] < 0.5 * terms.CLAIM["gradients and optimizer"]
