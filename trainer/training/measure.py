"""What a model makes of records that it has not seen: loss, greedy answers, next-token distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.backends import transformers
from trainer.kernels.loss import Hidden, of_batch
from trainer.training.batches import Row
from trainer.training.model import hidden_states, moved, tensors

STOPS = [106, 1]
"""<end_of_turn> and <eos>: either ends an answer."""

Advance = Callable[[int], None]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode and no gradients within the block; the mode of before afterwards."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def loss(
    model: Any,
    rows: Sequence[Row],
    batch_rows: int,
    advance: Advance = lambda n: None,
    *,
    hidden: Hidden | None = None,
    batch: Callable[[list[Row]], dict[str, Any]] = tensors,
) -> float:
    """Mean of -log p over all supervised tokens of the rows, nats. Rows of like length share a batch.

    hidden: what training computes its hidden states with, and batch: what it makes of rows; without them the model's own forward pass.
    """
    compute, head = hidden or hidden_states(model), _head(model)
    total, count = 0.0, 0
    for some in _batches(sorted(rows, key=lambda row: len(row.ids)), batch_rows):
        made = batch(list(some))
        total += float(of_batch(moved(made, head.device), compute, head))
        count += len(made["supervised"])
        advance(len(some))
    return total / count


def answers(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_rows: int, advance: Advance = lambda n: None
) -> list[list[int]]:
    """Greedy answers as ids, with the stop token where the model ended by itself. Prompts are padded at the left."""
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for numbers in _batches(order, batch_rows):
        width = max(len(prompts[number]) for number in numbers)
        ids = torch.tensor([[0] * (width - len(prompts[number])) + list(prompts[number]) for number in numbers])
        mask = torch.tensor([[0] * (width - len(prompts[number])) + [1] * len(prompts[number]) for number in numbers])
        device = _head(model).device
        new = transformers.greedy(model, ids.to(device), mask.to(device), max_new_tokens=max_new_tokens, stop_ids=STOPS)
        for number, tokens in zip(numbers, new.tolist(), strict=True):
            found[number] = _ended(tokens)
        advance(len(numbers))
    return found


def _ended(tokens: Sequence[int]) -> list[int]:
    """Up to and with the first stop token; what lies behind it is padding."""
    ends = [place for place, token in enumerate(tokens) if token in STOPS]
    return list(tokens[: ends[0] + 1] if ends else tokens)


class Reference(NamedTuple):
    """Next-token distributions at P positions of answers, the K most likely tokens each, best first."""

    record: npt.NDArray[np.int32]
    """[P] number of the record."""
    position: npt.NDArray[np.int32]
    """[P] index into the answer's tokens: the distribution that token was drawn from."""
    ids: npt.NDArray[np.int32]
    """[P, K]"""
    logprobs: npt.NDArray[np.float32]
    """[P, K] of the softmax over the whole vocabulary, nats."""


def reference(
    model: Any, prompts: Sequence[Sequence[int]], given: Sequence[Sequence[int]], *, top: int, advance: Advance = lambda n: None
) -> Reference:
    """Teacher-forced: token t of an answer is predicted from the prompt and the answer's first t tokens."""
    parts = []
    for number, (prompt, answer) in enumerate(zip(prompts, given, strict=True)):
        ids = torch.tensor([[*prompt, *answer]])
        batch = moved({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, _head(model).device)
        hidden = hidden_states(model)(batch)[0, len(prompt) - 1 : -1]
        logs = torch.log_softmax(torch.mm(hidden.to(_head(model).dtype), _head(model).t()).float(), dim=1)
        best = logs.topk(min(top, logs.shape[1]), dim=1)
        places = np.arange(len(answer), dtype=np.int32)
        parts.append((np.full_like(places, number), places, best.indices.int().cpu().numpy(), best.values.cpu().numpy()))
        advance(1)
    return Reference(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _head(model: Any) -> Tensor:
    """[V, H] output embeddings. Gemma 3 caps no logits."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
