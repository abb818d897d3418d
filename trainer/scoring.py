"""How alike two answers and two next-token distributions are. Pure arithmetic on strings and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def exact_match(expected: str, answer: str) -> bool:
    """Equal up to white space at the ends, which a chat template trims anyway."""
    return expected.strip() == answer.strip()


def share_exact(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Share of the answers that match, 0..1; 0 of nothing is 0."""
    assert len(expected) == len(answers)
    return sum(map(exact_match, expected, answers)) / len(expected) if expected else 0.0


def kl_nats(reference: Mapping[int, float], served: Mapping[int, float]) -> float:
    """KL(reference || served) in nats of two distributions known by their largest log-probabilities alone.

    Both are coarsened to the same partition of the vocabulary: one cell for every token that both name, one for all the
    rest. By the data-processing inequality (Cover & Thomas, Elements of Information Theory, section 2.8) merging cells never
    raises a divergence, so this is a lower bound of the true KL, and exact where both name the whole vocabulary.
    """
    common = reference.keys() & served.keys()
    divergence = sum(math.exp(reference[token]) * (reference[token] - served[token]) for token in common)
    rest, served_rest = (max(0.0, 1.0 - math.fsum(math.exp(logs[token]) for token in common)) for logs in (reference, served))
    if rest < _ROUNDING:
        return max(0.0, divergence)
    return max(0.0, divergence + rest * (math.log(rest) - math.log(max(served_rest, _ROUNDING))))


_ROUNDING = 1e-6
"""A rest below this is what float32 log-probabilities leave of 1: no evidence of a probability."""


def same_top1(reference: Mapping[int, float], served: Mapping[int, float]) -> bool:
    """Whether both find the same token most likely."""
    return max(reference, key=reference.__getitem__) == max(served, key=served.__getitem__)


def top1_agreement(reference: Sequence[Mapping[int, float]], served: Sequence[Mapping[int, float]]) -> float:
    """Share of the positions at which both have the same most likely token, 0..1."""
    assert len(reference) == len(served) > 0
    return sum(map(same_top1, reference, served)) / len(reference)
