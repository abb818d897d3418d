"""scoring: figures that a release is judged by, so each has a hand-made case."""

from __future__ import annotations

import math

import pytest

from trainer.scoring import exact_match, kl_nats, same_top1, share_exact, top1_agreement


def logs(*probabilities: float) -> dict[int, float]:
    return {token: math.log(p) for token, p in enumerate(probabilities)}


def true_kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


P, Q = (0.5, 0.25, 0.15, 0.1), (0.4, 0.2, 0.1, 0.3)


def test_an_answer_matches_up_to_white_space_at_its_ends() -> None:
    assert exact_match("*/5 * * * *", " */5 * * * *\n")
    assert not exact_match("*/5 * * * *", "*/5 * * *")
    assert share_exact(["a", "b", "c", "d"], ["a", "b", "x", "d "]) == 0.75
    assert share_exact([], []) == 0.0


def test_over_the_whole_vocabulary_the_kl_is_exact() -> None:
    assert kl_nats(logs(*P), logs(*Q)) == pytest.approx(true_kl(P, Q), rel=1e-12)


def test_a_distribution_does_not_diverge_from_itself() -> None:
    assert kl_nats(logs(*P), logs(*P)) == pytest.approx(0.0, abs=1e-12)
    assert kl_nats(logs(*P[:2]), logs(*P[:2])) == pytest.approx(0.0, abs=1e-12)


def test_the_rest_is_one_cell_and_the_figure_a_lower_bound() -> None:
    cut = kl_nats(dict(list(logs(*P).items())[:2]), dict(list(logs(*Q).items())[:3]))
    assert cut == pytest.approx(true_kl((0.5, 0.25, 0.25), (0.4, 0.2, 0.4)), rel=1e-12)
    assert 0 < cut < true_kl(P, Q)


def test_tokens_that_only_one_names_fall_into_the_rest() -> None:
    reference, served = {0: math.log(0.6), 1: math.log(0.3)}, {0: math.log(0.6), 2: math.log(0.3)}
    assert kl_nats(reference, served) == pytest.approx(0.0, abs=1e-12), "the cells 0 and rest are equally likely in both"


def test_swapping_the_sides_changes_the_figure() -> None:
    """Sentinel: KL is not symmetric, so a call with its arguments the wrong way round shows."""
    assert kl_nats(logs(*P), logs(*Q)) != pytest.approx(kl_nats(logs(*Q), logs(*P)), rel=0.05)


def test_rounding_of_float32_logs_is_no_evidence() -> None:
    sure = {7: -1e-7}
    assert kl_nats(sure, sure) == pytest.approx(0.0, abs=1e-6)
    assert kl_nats({7: 0.0}, {7: math.log(0.5)}) == pytest.approx(math.log(2))


def test_top1_counts_positions_with_the_same_favourite() -> None:
    assert same_top1(logs(0.6, 0.4), logs(0.9, 0.1)) and not same_top1(logs(0.6, 0.4), logs(0.4, 0.6))
    assert top1_agreement([logs(0.6, 0.4), logs(0.6, 0.4)], [logs(0.7, 0.3), logs(0.2, 0.8)]) == 0.5
