"""Thirty optimizer steps: our layer's loss curve beside PEFT's DoRA on transformers' layers, same weights, same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from trainer import random_weights
from trainer.backends import hub, tiny
from trainer.config import Config
from trainer.kernels import loss, stack
from trainer.training import model as models
from trainer.training.batches import Row
from trainer.training.scaling import Stepper

STEPS = 30


def curve(cfg: Config, rows: Sequence[Row], first: dict[str, torch.Tensor], *, ours: bool) -> list[float]:
    """The loss before each step. first: where the adapter begins; filled when empty, since two devices draw other random numbers."""
    model = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
    device = torch.device(cfg.model.device)
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for name, one in parameters.items():
        first.setdefault(name, one.detach().cpu().clone())
        if "lora_A" in name:
            one.data.copy_(first[name])
    hidden, refresh = models.hidden_states(model), lambda: None
    if ours:
        kernels = cfg.kernels.model_copy(update={"layer": "ours"})
        installed = stack.install(
            model,
            hub.size(cfg.model, cfg.paths.cache),
            stack.Settings(kernels, getattr(torch, cfg.model.dtype), cfg.adapter.scale, 256, {}),
        )
        hidden, refresh = installed.hidden, installed.refresh
    inner = torch.optim.AdamW(list(parameters.values()), lr=2e-3)
    stepper = Stepper(inner, max_norm=1.0, after=refresh, scaled=cfg.model.dtype == "float16")
    found = []
    for step in range(STEPS):
        batch = (models.packed_tensors if ours else models.tensors)([rows[step % len(rows)]])
        total = loss.of_batch(models.moved(batch, device), hidden, model.get_output_embeddings().weight)
        mean = total / (len(rows[0].ids) - 1)  # as the loop has it: a sum's gradients would overflow the scale that it begins with
        found.append(mean.item())
        (mean * stepper.scale).backward()  # type: ignore[no-untyped-call]
        stepper.step()
        stepper.zero_grad()
    assert stepper.skipped == 0
    return found


def rows(vocabulary: int, length: int) -> list[Row]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for _ in range(3)]
    return [Row(ids, [-100, *ids[1:]], (len(ids),)) for ids in made]


def test_our_layer_takes_the_course_of_pefts_dora(tiny_config: Callable[..., Config]) -> None:
    cfg, first = tiny_config("model.dtype=float32", "adapter.rank=8", "kernels.dora=stock"), dict[str, torch.Tensor]()
    wanted = curve(cfg, rows(600, 48), first, ours=False)
    found = curve(tiny_config("model.dtype=float32", "adapter.rank=8"), rows(600, 48), first, ours=True)
    assert wanted[-1] < 0.9 * wanted[0], "it learns"
    assert found == pytest.approx(wanted, rel=1e-2)
    slower = curve(tiny_config("model.dtype=float32", "adapter.rank=8", "adapter.alpha=8"), rows(600, 48), first, ours=True)
    assert slower != pytest.approx(wanted, rel=1e-2), "half the scale is another curve"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-2), ("float16", 2e-2)])
def test_so_it_does_on_a_card_in_the_270ms_shape(dtype: str, tolerance: float, tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    """Random weights; the judge computes in float32 on the same card. float16 is T4 mode."""
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))  # any will do: the rows are numbers
    where = [str(tmp_path / "model"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert random_weights.main([*where, "--size", "270m", "--device", "cuda"]) == 0
    usual = [f"model.name={tmp_path / 'model'}", f"paths.cache={tmp_path / 'cache'}", "model.device=cuda"]
    first: dict[str, torch.Tensor] = {}
    wanted = curve(tiny_config(*usual, "model.dtype=float32", "kernels.dora=stock"), rows(50_000, 200), first, ours=False)
    found = curve(tiny_config(*usual, f"model.dtype={dtype}"), rows(50_000, 200), first, ours=True)
    assert wanted[-1] < 0.9 * wanted[0], "it learns"
    assert found == pytest.approx(wanted, rel=tolerance)
