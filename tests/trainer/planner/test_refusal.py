from __future__ import annotations

import pytest

from trainer.config import load
from trainer.errors import DoesNotFitError
from trainer.gemma3 import SIZES
from trainer.planner import refusal

SIZE, CFG = SIZES["12b"], load("gemma3-12b-t4")
T4 = 15_828_254_720
OLLAMA = "ollama (pid 7) holds 6.00 GB; free it with: ollama stop MODEL"


def refused(free_bytes: int, *holders: str) -> DoesNotFitError:
    with pytest.raises(DoesNotFitError) as caught:
        refusal.require(CFG, SIZE, where="Tesla T4", free_bytes=free_bytes, total_bytes=T4, holders=holders)
    assert caught.value.exit_code == 4
    return caught.value


def test_a_free_card_is_fine_and_others_on_a_card_with_room_too() -> None:
    refusal.require(CFG, SIZE, where="Tesla T4", free_bytes=T4, total_bytes=T4)
    refusal.require(CFG, SIZE, where="H100", free_bytes=60 * 10**9, total_bytes=80 * 10**9, holders=[OLLAMA])


def test_memory_that_another_process_holds_costs_no_setting_it_is_named_with_the_command_that_frees_it() -> None:
    message = str(refused(T4 - 6 * 10**9, OLLAMA))
    assert "9.83 GB of the 15.83 GB of the Tesla T4 are free" in message
    assert OLLAMA in message
    assert "--set" not in message


def test_a_card_that_is_too_small_by_itself_is_told_the_largest_part_and_the_settings() -> None:
    message = str(refused(12 * 10**9))
    assert "the Tesla T4 has 12.00 GB" in message
    assert "the largest part that a setting moves is kept tensors, 2.49 GB (kernels.keep_bytes)" in message
    assert "--set kernels.keep_bytes=0 " in message or "--set kernels.keep_bytes=1" in message


def test_a_run_that_does_not_fit_even_alone_gets_both() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        refusal.require(
            load("gemma3-12b-t4", ["kernels.layer=stock"]), SIZE, where="Tesla T4", free_bytes=T4 - 10**9, total_bytes=T4, holders=[OLLAMA]
        )
    assert "--set kernels.layer=ours" in str(caught.value)
    assert OLLAMA in str(caught.value)
