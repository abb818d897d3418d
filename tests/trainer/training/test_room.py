"""The check before a training, on a card whose memory another process holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import cards, gemma3
from trainer.config import load
from trainer.errors import DoesNotFitError
from trainer.training import room


def test_on_a_cpu_nothing_is_asked() -> None:
    room.require(load("tiny"))


@pytest.mark.gpu
def test_memory_that_another_process_holds_is_named_and_costs_no_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(gemma3.SIZES["12b"].to_config("bfloat16")), encoding="utf-8")
    cfg = load("gemma3-12b-t4", [f"model.name={tmp_path}"])
    room.require(cfg)
    card = cards.first()
    assert card is not None
    free = cards.free_bytes(card)
    assert free is not None
    script = f"import torch; x = torch.empty({free - 8_000_000_000}, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DoesNotFitError) as caught:
            room.require(cfg)
        holder.communicate("\n")
    assert "does not fit" in str(caught.value)
