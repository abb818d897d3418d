"""Who gets the engine, for how long, and what happens when a client leaves: the only owner of slots, queue and time-outs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

from server.chat import Event, Finish
from server.errors import Busy, EngineError, EngineStalled


class Admission:
    """A fixed number of slots and a bounded waiting room before them, first come, first served."""

    def __init__(self, slots: int, waiting: int, queue_timeout_s: float, stall_timeout_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        self._slots = asyncio.Semaphore(slots)
        self._room = slots + waiting
        self._queue_timeout_s = queue_timeout_s
        self._inside = 0

    async def enter(self) -> None:
        """Wait for a slot.

        Raises:
            Busy: the waiting room is full, or no slot came free in time.
        """
        if self._inside >= self._room:
            raise Busy(f"{self._inside} requests are being answered or wait already: try again in a moment")
        self._inside += 1
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            self._inside -= 1
            raise Busy(f"no slot came free within {self._queue_timeout_s:g} s: try again in a moment") from None
        except asyncio.CancelledError:
            self._inside -= 1
            raise

    def leave(self) -> None:
        self._slots.release()
        self._inside -= 1


class Answer:
    """One answer on its way: a slot, and the engine's events. Leaving the `async with` gives both back, at any moment.

    `start()` waits for the slot and the first event, so that an error before it still gets a status of its own.
    """

    def __init__(self, admission: Admission, events: AsyncGenerator[Event]) -> None:
        self._admission = admission
        self._events = events
        self._first: Event | None = None
        self._inside = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def start(self) -> None:
        await self._admission.enter()
        self._inside = True
        self._first = await self._next()

    async def aclose(self) -> None:
        """Cancel what is left upstream and give the slot back; calling it twice is fine."""
        try:
            await self._events.aclose()
        finally:
            if self._inside:
                self._inside = False
                self._admission.leave()

    async def events(self) -> AsyncGenerator[Event]:
        """The events, the last of them a Finish. Raises EngineError when the engine breaks off."""
        event = self._first
        while event is not None:
            yield event
            if isinstance(event, Finish):
                return
            event = await self._next()

    async def _next(self) -> Event:
        try:
            async with asyncio.timeout(self._admission.stall_timeout_s):
                return await anext(self._events)
        except TimeoutError:
            raise EngineStalled(f"the engine said nothing for {self._admission.stall_timeout_s:g} s") from None
        except StopAsyncIteration:
            raise EngineError("the engine's answer broke off before its end") from None
