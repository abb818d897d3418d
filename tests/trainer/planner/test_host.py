from __future__ import annotations

import pytest

from trainer.config import load
from trainer.gemma3 import SIZES
from trainer.gguf import write
from trainer.planner import host
from trainer.planner.cards import HOST_BYTES

SIZE = SIZES["12b"]


@pytest.mark.parametrize("name", ["270m", "1b", "4b", "12b", "27b"])
def test_the_gguf_is_as_large_as_export_will_make_it(name: str) -> None:
    assert host.gguf_bytes(SIZES[name]) == pytest.approx(write.num_bytes(SIZES[name], "q4_k_m"), rel=0.02)


def test_disks_hold_the_download_the_state_checkpoints_and_the_gguf() -> None:
    cfg = load("gemma3-12b-t4")
    found = host.disk(cfg, SIZE, 24_380_000_000)
    adapter, state = 1_056_473_088, 549_838_848
    assert found["NF4 state"] == pytest.approx(7.567e9, rel=0.001)
    assert found["train"] == 3 * (adapter + state) + 3 * adapter
    assert host.checkpoint_bytes(cfg, SIZE) == adapter + state
    assert host.mirror_bytes(cfg, SIZE) == 2 * (2 * adapter + state)


def test_the_preset_leaves_colabs_machine_room_in_every_stage() -> None:
    found = host.memory(load("gemma3-12b-t4"), SIZE)
    assert list(found) == ["quantise", "train", "export", "verify"]
    assert max(found.values()) < 0.6 * HOST_BYTES
    assert found["train"] - host.CUDA_LIBRARIES_BYTES == pytest.approx(3.99e9, rel=0.01)
