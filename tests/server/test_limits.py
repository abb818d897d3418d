"""What one key may ask, told by a clock of the test's own."""

from __future__ import annotations

import pytest

from server.errors import TooManyRequests
from server.limits import Limiter, Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_slides_and_its_refusals_do_not_count() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    limits = Limits(requests_per_minute=2, concurrent=9)
    for _ in range(2):
        with limiter.place("a", limits):
            clock.now += 10
    for wait_s in (40, 39):
        with pytest.raises(TooManyRequests) as refused:
            limiter.place("a", limits)
        assert refused.value.retry_after_s == wait_s
        clock.now += 1
    clock.now += 38
    with limiter.place("a", limits), pytest.raises(TooManyRequests):
        limiter.place("a", limits)


def test_places_at_the_same_time_are_counted_by_key_and_given_back_after_an_error() -> None:
    limiter = Limiter(Clock())
    limits = Limits(requests_per_minute=99, concurrent=1)
    with pytest.raises(ZeroDivisionError), limiter.place("a", limits):
        with pytest.raises(TooManyRequests, match="wait for one to end"):
            limiter.place("a", limits)
        with limiter.place("b", limits):
            raise ZeroDivisionError
    with limiter.place("a", limits), limiter.place("b", limits):
        pass


def test_without_limits_there_are_none() -> None:
    limiter = Limiter(Clock())
    for _ in range(1000):
        limiter.place("", None).__enter__()
