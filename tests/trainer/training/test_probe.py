from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.backends import hub
from trainer.config import Config
from trainer.dataset.records import read
from trainer.kernels import loss
from trainer.planner import standing
from trainer.training import loop, optimizer, probe
from trainer.training import model as models
from trainer.training.batches import examples
from trainer.training.scaling import Stepper


@pytest.mark.parametrize("settings", [(), ("kernels.layer=ours",), ("kernels.layer=ours", "pack.enabled=true"), ("kernels.dora=stock",)])
def test_the_probe_leaves_weights_gradients_and_random_numbers_as_they_were(
    settings: tuple[str, ...], tiny_config: Callable[..., Config], tiny_prepared: Path
) -> None:
    cfg = tiny_config("adapter.dropout=0.5" if "kernels.dora=stock" in settings else "adapter.dropout=0", *settings)
    model = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
    how = loop.computing(cfg, model)
    stepper = Stepper(optimizer.build(model.named_parameters(), cfg.train), max_norm=1.0, after=how.refresh, scaled=False)
    todo = loop.work(cfg, examples(read(tiny_prepared / "train.jsonl")), examples(read(tiny_prepared / "valid.jsonl")))
    seen: list[int] = []

    def hidden(inputs: Any) -> torch.Tensor:
        seen.append(inputs["input_ids"].numel())
        return how.hidden(inputs)

    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" in name}
    drawn = torch.get_rng_state()
    size = hub.size(cfg.model, cfg.paths.cache)
    state_bytes = standing.adapter(cfg, size)["optimizer state"]
    probe.longest(
        cfg, model, todo.rows, 3, stepper, hidden=hidden, summed=loop._summed(cfg, how), gather=how.gather, state_bytes=state_bytes
    )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not stepper.state
    assert torch.equal(torch.get_rng_state(), drawn)
    longest = sorted((len(row.ids) for row in todo.rows), reverse=True)[: cfg.train.batch_records]
    packed = cfg.pack.enabled or cfg.kernels.layer == "ours"
    assert seen == [sum(longest) if packed else len(longest) * longest[0]] * 2, "twice: the second meets the first one's gradients"


def test_steps_after_a_probe_are_the_same_to_the_last_bit(tiny_config: Callable[..., Config], tiny_prepared: Path) -> None:
    """With dropout, so that one random number too many would change every loss; the sentinel draws one."""
    cfg = tiny_config("adapter.dropout=0.3", "kernels.dora=stock")
    usual = course(cfg, tiny_prepared, lambda: None, probed=False)
    assert course(cfg, tiny_prepared, lambda: None, probed=True) == usual
    assert course(cfg, tiny_prepared, lambda: torch.rand(1), probed=True) != usual


def course(cfg: Config, prepared: Path, before: Callable[[], object], *, probed: bool) -> list[float]:
    """Losses of four steps."""
    model = models.with_new_adapter(cfg, models.base(cfg, models.nf4(cfg)))
    how = loop.computing(cfg, model)
    stepper = Stepper(optimizer.build(model.named_parameters(), cfg.train), max_norm=1.0, after=how.refresh, scaled=False)
    rows = loop.work(cfg, examples(read(prepared / "train.jsonl")), []).rows
    head = model.get_base_model().get_output_embeddings().weight
    torch.manual_seed(5)
    before()
    if probed:
        probe.longest(cfg, model, rows, 2, stepper, hidden=how.hidden, summed=how.summed, gather=how.gather, state_bytes=1000)
    model.train()
    found = []
    for start in range(0, 16, 4):
        value = loss.of_batch(models.collator(cfg)(list(rows[start : start + 4])), how.hidden, head, how.summed)
        value.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        stepper.zero_grad()
        found.append(float(value.detach()))
    return found
