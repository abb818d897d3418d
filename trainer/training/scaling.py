"""One optimizer step: unscale, clip, skip on overflow, and tell who keeps something that follows from the weights.

Float16 gradients of a 12B model lie around and below 6e-8, where float16 ends, so the loss is multiplied by a power of two
before backward and the gradients are divided by it (arXiv 1710.03740, section 3.2). Which power is found by trying: an
overflow halves it and costs one step, a run of good steps doubles it. Powers of two change no digit of a gradient.

The adapter's gradients are float32 and wait for the whole step, so norm, clip and unscaling are one reduction and one
multiplication, and the optimizer inside never sees a gradient that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.errors import StoppedError

FIRST, LEAST, MOST = 2.0**12, 2.0**-10, 2.0**24
"""Where the scale begins, below which it is no overflow any more, and where it stays."""
GOOD_STEPS = 200
"""Steps without an overflow before a larger scale is tried."""


class Stepper(torch.optim.Optimizer):
    """The optimizer that HF steps; `inner` is the one that changes weights. Groups and state are inner's own, not copies."""

    scale: float
    """What the loss is multiplied by before backward; 1 where nothing is scaled."""
    grad_norm: float | None
    """L2 norm over all gradients of the last step, unscaled and before clipping; None before the first and after a skipped step."""
    skipped: int
    """Steps that changed no weight."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        max_norm: float,
        after: Callable[[], None],
        scaled: bool,
        gather: Callable[[], None] = lambda: None,
    ) -> None:
        """
        after: called when weights have changed, and only then; DoRA's norms follow from them.
        scaled: float16 arithmetic; else the scale is 1 for ever, and a gradient that is no number ends the training.
        gather: called first in each step; brings gradients that were kept elsewhere to `parameter.grad`.
        """
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._max_norm, self._after, self._gather, self._scaled = inner, max_norm, after, gather, scaled
        self.scale, self.grad_norm, self.skipped = FIRST if scaled else 1.0, None, 0
        self._steps = self._good = 0
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """
        Raises:
            StoppedError: the gradients are no numbers, and no smaller scale would change that.
        """
        assert closure is None, "gradients are there already"
        self._gather()
        self._steps += 1
        grads = [one.grad for group in self.param_groups for one in group["params"] if one.grad is not None]
        total = _norm(grads)
        if not torch.isfinite(total):
            self._skip()
            return
        norm = total / self.scale
        self.grad_norm = float(norm)
        # In float32 and with torch's 1e-6, so that at scale 1 this is torch's clip_grad_norm_ to the last bit.
        factor = float((self._max_norm / (norm + 1e-6)).clamp(max=1.0)) / self.scale
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        self._inner.step()
        self._after()
        self._good += 1
        if self._scaled and self._good == GOOD_STEPS:
            self.scale, self._good = min(2 * self.scale, MOST), 0

    def _skip(self) -> None:
        """Weights, optimizer state and gradients stay as they are; HF drops the gradients, as after each step.

        It also counts the step and moves its schedule on: a few skipped steps of a training shift no schedule that matters, and
        step numbers, schedule and data stay in line for a resume.
        """
        self.grad_norm = None
        self.skipped += 1
        self._good = 0
        if self._scaled:
            self.scale /= 2
        if not self._scaled or self.scale < LEAST:
            raise StoppedError(diverged(self._steps - 1, "the gradient's norm"))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Inner's, and beside it what a resumed training needs to go on with the same scale."""
        own = {"scale": self.scale, "good": self._good, "steps": self._steps, "skipped": self.skipped}
        return {**self._inner.state_dict(), "scaling": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        own = rest.pop("scaling")
        self._inner.load_state_dict(rest)
        self._share()
        self.scale, self._good, self._steps, self.skipped = own["scale"], own["good"], own["steps"], own["skipped"]

    def _share(self) -> None:
        """Loading a state gives inner new groups and a new state."""
        self.param_groups, self.state, self.defaults = self._inner.param_groups, self._inner.state, self._inner.defaults


def _norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all, float32, on the CPU: fetching it is the step's only wait for the card."""
    assert grads, "a step without a gradient"
    norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)  # noqa: SLF001 - torch documents it under this name
    total: Tensor = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))
    return total.cpu()


def diverged(step: int, what: str) -> str:
    """What to tell the person when `what` is no number. step: the last one that was sound."""
    return (
        f"train: {what} is no number after step {step}; the last checkpoint is kept. Lower train.learning_rate or "
        "train.max_grad_norm, or look for broken records near that step, and start with --set run.fresh=true"
    )
