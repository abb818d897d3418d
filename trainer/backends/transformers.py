"""Wall around transformers: load the pre-quantised text model, say nothing, generate greedily."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def quiet() -> None:
    """transformers' own bars and notes off; what the person should know comes through trainer.progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(state: Path, *, dtype: str, device: str) -> Any:
    """The Gemma3ForCausalLM in a pre-quantised NF4 checkpoint, on one device, everything that is not NF4 in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    quiet()
    return AutoModelForCausalLM.from_pretrained(
        state, dtype=getattr(torch, dtype), device_map={"": device}, attn_implementation="sdpa", local_files_only=True
    )


def greedy(model: Any, ids: Any, mask: Any, *, max_new_tokens: int, stop_ids: list[int]) -> Any:
    """[B, at most max_new_tokens] new tokens of left-padded prompts; a row that stopped is filled with 0."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=0, use_cache=True)
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return found[:, ids.shape[1] :]
