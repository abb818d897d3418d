"""interrupt: a signal becomes a question, and only within the block."""

from __future__ import annotations

import os
import signal

import pytest

from trainer.training.interrupt import listening


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_and_does_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listening() as heard:
        assert not heard()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert heard()
    assert signal.getsignal(number) is before
