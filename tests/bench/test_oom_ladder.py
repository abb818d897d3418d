from __future__ import annotations

from itertools import pairwise

from bench import oom_ladder
from trainer import gemma3
from trainer.config import load


def test_there_is_a_smaller_cap_for_every_rung_of_the_product() -> None:
    caps = list(oom_ladder.caps(load("gemma3-12b-t4"), gemma3.SIZES["12b"]))
    assert len(caps) == 7 and all(above > below for above, below in pairwise(caps))
