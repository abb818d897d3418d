"""Who gets the engine, for how long, and what happens when a client leaves: the only owner of slots, queue and time-outs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from server import logs
from server.chat import Event, Finish
from server.errors import AnswerTooLong, Busy, ClientGone, Draining, EngineError, EngineStalled, QueueTimeout, ServerError, shown
from server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Timeouts:
    """All in seconds; `first_token_s` and `total_s` count from the slot on."""

    queue_s: float
    first_token_s: float
    stall_s: float
    total_s: float


class Admission:
    """A fixed number of slots and a bounded queue before them, first come, first served."""

    def __init__(self, slots: int, waiting: int, timeouts: Timeouts, metrics: Metrics) -> None:
        self.timeouts = timeouts
        self.metrics = metrics
        self.draining = False
        self._slots = slots
        self._free = slots
        self._waiting = waiting
        self._queue: deque[asyncio.Future[None]] = deque()
        self._answers: set[Answer] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self) -> None:
        """Raises Draining once the server was asked to stop."""
        if self.draining:
            raise Draining("the server is stopping and takes nothing new: try again in a moment")

    async def enter(self, answer: Answer) -> None:
        """Wait for a slot.

        Raises:
            Busy: the queue is full, or no slot came free in time. Draining: the server was asked to stop.
        """
        self.check()
        if self._free:
            self._free -= 1
        else:
            await self._turn()
        self._answers.add(answer)
        self._idle.clear()
        self.metrics.answering.set(len(self._answers))

    def leave(self, answer: Answer) -> None:
        self._answers.discard(answer)
        self.metrics.answering.set(len(self._answers))
        if not self._answers:
            self._idle.set()
        self._hand_on()

    async def _turn(self) -> None:
        if len(self._queue) >= self._waiting:
            raise Busy(f"{self._slots + len(self._queue)} requests are being answered or wait already: try again in a moment")
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self.metrics.position.observe(len(self._queue))
        self.metrics.waiting.set(len(self._queue))
        entered = False
        try:
            async with asyncio.timeout(self.timeouts.queue_s):
                await turn
            entered = True
        except TimeoutError:
            raise QueueTimeout(f"no slot came free within {self.timeouts.queue_s:g} s: try again in a moment") from None
        finally:
            if turn in self._queue:
                self._queue.remove(turn)
            elif not entered and not turn.cancelled() and turn.exception() is None:
                self._hand_on()  # the slot came in the same moment in which the wait ended
            self.metrics.waiting.set(len(self._queue))

    def _hand_on(self) -> None:
        """Give a slot to who waits longest: nobody who comes now gets it before them."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    async def drain(self, grace_s: float, farewell_s: float = 2.0) -> None:
        """Take nothing new, refuse who waits, and let answers under way end within `grace_s`; then end them with an error."""
        self.draining = True
        for turn in self._queue:
            if not turn.done():  # else its wait has just ended
                turn.set_exception(Draining("the server is stopping: try again in a moment"))
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            self.cut()
            with suppress(TimeoutError):
                async with asyncio.timeout(farewell_s):
                    await self._idle.wait()

    def cut(self) -> None:
        """End every answer under way with an error, now."""
        for answer in self._answers:
            answer.cut()


class Answer:
    """One answer on its way: a slot, and the engine's events. Leaving the `async with` gives both back, at any moment.

    `start()` waits for the slot and the first event, so that an error before it still gets a status of its own; a 12B on a CPU
    may take minutes for that, longer than a proxy bears silence, so that a stream stops waiting after `patience_s`.
    """

    def __init__(self, admission: Admission, events: AsyncGenerator[Event]) -> None:
        self._admission = admission
        self._metrics = admission.metrics
        self._events = events
        self._starting: asyncio.Task[None] | None = None
        self._first: Event | None = None
        self._inside = False
        self._counted = False
        self._total_at = self._first_at = 0.0
        self._limit: asyncio.Timeout | None = None
        self._is_cut = False
        self._error: Exception = ClientGone("the client hung up")
        self._finish: Finish | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._error = error
        await self.aclose()

    async def start(self, patience_s: float | None = None) -> None:
        """Wait for the slot and the first event. After `patience_s` without them it returns, and events() goes on waiting."""
        self._starting = asyncio.create_task(self._start())
        done, _ = await asyncio.wait({self._starting}, timeout=patience_s)
        if done:
            self._starting.result()

    async def _start(self) -> None:
        clock = asyncio.get_running_loop().time
        asked_at = clock()
        try:
            await self._admission.enter(self)
        except ServerError as error:
            self._error = error
            raise
        self._inside = True
        entered_at = clock()
        self._metrics.wait.observe(entered_at - asked_at)
        self._total_at = entered_at + self._admission.timeouts.total_s
        self._first = await self._next(self._admission.timeouts.first_token_s)
        self._first_at = clock()
        self._metrics.first_token.observe(self._first_at - asked_at)
        logs.note(wait_s=round(entered_at - asked_at, 4), first_token_s=round(self._first_at - asked_at, 4))

    async def events(self) -> AsyncGenerator[Event]:
        """The events, the last of them a Finish. Raises EngineError when the engine breaks off."""
        if self._starting:
            await self._starting
        event = self._first
        while event is not None:
            if isinstance(event, Finish):
                self._finished(event)
                await self.aclose()  # the engine is free while the client still reads
                yield event
                return
            yield event
            event = await self._next(self._admission.timeouts.stall_s)

    async def aclose(self) -> None:
        """Cancel what is left upstream and give the slot back; calling it twice is fine."""
        if self._starting:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        try:
            await self._events.aclose()
        finally:
            if self._inside:
                self._inside = False
                self._admission.leave(self)
            if not self._counted:
                self._counted = True
                self._count()

    def cut(self) -> None:
        """End it with an error: the server waits no longer."""
        self._is_cut = True
        if self._limit and not self._limit.expired():
            self._limit.reschedule(0)

    def blame(self, error: Exception) -> None:
        """Count it as ended by `error`, which does not leave the `async with`."""
        self._error = error

    async def _next(self, limit_s: float) -> Event:
        try:
            return await self._within(limit_s)
        except ServerError as error:
            self._error = error
            raise

    async def _within(self, limit_s: float) -> Event:
        if self._is_cut:
            raise Draining(CUT)
        limit_at = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(min(limit_at, self._total_at)) as self._limit:
                return await anext(self._events)
        except TimeoutError:
            if self._is_cut:
                raise Draining(CUT) from None
            if limit_at > self._total_at:
                raise AnswerTooLong(f"the answer took longer than {self._admission.timeouts.total_s:g} s") from None
            raise EngineStalled(f"the engine said nothing for {limit_s:g} s") from None
        except StopAsyncIteration:
            raise EngineError("the engine's answer broke off before its end") from None
        finally:
            self._limit = None

    def _finished(self, finish: Finish) -> None:
        self._finish = finish
        usage, seconds = finish.usage, asyncio.get_running_loop().time() - self._first_at
        self._metrics.tokens.labels("prompt").inc(usage.prompt_tokens)
        self._metrics.tokens.labels("completion").inc(usage.completion_tokens)
        if usage.completion_tokens > 1 and seconds > 0:
            self._metrics.speed.observe((usage.completion_tokens - 1) / seconds)
        logs.note(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    def _count(self) -> None:
        code = self._finish.reason if self._finish else shown(self._error).code
        self._metrics.answers.labels(code).inc()
        if not self._finish and isinstance(self._error, EngineError):
            self._metrics.engine_errors.labels(code).inc()
        logs.note(outcome=code)


CUT = "the server is stopping and could not wait for the end of this answer: try again in a moment"
