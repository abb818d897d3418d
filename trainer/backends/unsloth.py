"""Wall around unsloth: load the NF4 state as it is, and put DoRA on it.

unsloth changes torch, transformers, peft and trl at import, so it is imported in one place, and before any of them. It reads
where to compile to from the environment (UNSLOTH_COMPILE_LOCATION), which the worker's parent sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config import Adapter
from trainer.errors import MachineError, ModelError


def load(state: Path, *, dtype: str, max_tokens: int) -> Any:
    """The text model from a pre-quantised checkpoint, every linear of it NF4.

    Raises:
        MachineError: unsloth is not installed.
        ModelError: what was loaded is not what the state holds.
    """
    fast_model = _unsloth()
    import torch

    model, _ = fast_model.from_pretrained(
        model_name=str(state),
        max_seq_length=max_tokens,
        dtype=getattr(torch, dtype),
        load_in_4bit=True,
        use_exact_model_name=True,  # else unsloth takes another quantisation of the same name
        use_gradient_checkpointing="unsloth",
        device_map={"": 0},
    )
    require_exact(counted(model), expected(state))
    return model


def attach(model: Any, adapter: Adapter, *, checkpointing: bool, seed: int) -> Any:
    """A PeftModel with a new adapter."""
    return _unsloth().get_peft_model(
        model,
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        bias="none",
        use_dora=adapter.dora,
        use_rslora=adapter.rslora,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=seed,
    )


def counted(model: Any) -> dict[str, int]:
    """What was really loaded: linears by kind, and the bytes of NF4 weights."""
    import torch

    linears = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")]
    quantised = [module for module in linears if type(module).__name__ == "Linear4bit"]
    return {
        "linears in 16 or 32 bit": len(linears) - len(quantised),
        "linears as NF4": len(quantised),
        "bytes of NF4": sum(module.weight.numel() * module.weight.element_size() for module in quantised),
    }


def expected(state: Path) -> dict[str, int]:
    """The same count, from the headers of the state's files."""
    from safetensors import safe_open

    count, size = 0, 0
    for file in sorted(state.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            names = set(tensors.keys())
            for name in names:
                if f"{name}.quant_map" in names:
                    count += 1
                    size += _num_bytes(tensors.get_slice(name).get_shape())
    return {"linears in 16 or 32 bit": 0, "linears as NF4": count, "bytes of NF4": size}


def require_exact(found: Mapping[str, int], wanted: Mapping[str, int]) -> None:
    """Raises ModelError where the two counts differ."""
    problems = [
        f"{what}: {found[what]:,} were loaded, the NF4 state holds {number:,}" for what, number in wanted.items() if found[what] != number
    ]
    if problems:
        raise ModelError(*problems, "unsloth loaded another model than it was given; delete paths.cache and try again")


def _num_bytes(shape: list[int]) -> int:
    """NF4 lies as bytes of two weights each."""
    size = 1
    for length in shape:
        size *= length
    return size


def _unsloth() -> Any:
    if find_spec("unsloth") is None:
        raise MachineError(
            'model.backend = "unsloth", but unsloth is not installed: run `make setup` on a GPU host, or take PRESET=gemma3-270m-cpu'
        )
    import unsloth

    return unsloth.FastModel
