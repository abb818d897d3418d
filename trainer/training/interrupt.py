"""Ctrl-C and SIGTERM as a question that the loop asks after each step, so that a step is never torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Within the block the signals only answer the yielded question; afterwards the old handlers are back.

    A terminal sends Ctrl-C to a whole process group and a parent may forward it as SIGTERM: more than one signal means no
    more than one. Outside the main thread nobody can listen, and the answer stays no.
    """
    heard = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield heard.is_set
        return
    before = {number: signal.signal(number, lambda *_: heard.set()) for number in SIGNALS}
    try:
        yield heard.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
