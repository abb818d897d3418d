"""How much one key may ask, and how long a body may take. What holds for connections stands in server/port.py."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooSlow, TooManyRequests

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    requests_per_minute: int
    concurrent: int


@dataclass(slots=True)
class _Use:
    """When a key's requests of the last minute came, and how many are under way."""

    times: deque[float] = field(default_factory=deque)
    under_way: int = 0


class Limiter:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: defaultdict[str, _Use] = defaultdict(_Use)

    def place(self, name: str, limits: Limits | None) -> AbstractContextManager[None]:
        """A place for one request, given back when its block is left. Raises TooManyRequests at once; a refusal does not count."""
        if limits is None:
            return nullcontext()
        use, now = self._uses[name], self._clock()
        while use.times and now - use.times[0] >= WINDOW_S:
            use.times.popleft()
        if use.under_way >= limits.concurrent:
            raise TooManyRequests(
                f"this key has {use.under_way} requests under way, and may have {limits.concurrent}: wait for one to end", 1
            )
        if len(use.times) >= limits.requests_per_minute:
            wait_s = math.ceil(WINDOW_S - (now - use.times[0]))
            raise TooManyRequests(f"this key may ask {limits.requests_per_minute} times a minute: try again in {wait_s} s", max(1, wait_s))
        use.times.append(now)
        use.under_way += 1
        return self._held(use)

    @contextmanager
    def _held(self, use: _Use) -> Iterator[None]:
        try:
            yield
        finally:
            use.under_way -= 1


class BodyClock:
    """The middleware that gives a body `timeout_s` to come; then reading it raises BodyTooSlow."""

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self.app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        end_at = asyncio.get_running_loop().time() + self._timeout_s
        is_whole = False

        async def receive_in_time() -> Message:
            nonlocal is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(end_at):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(f"the body did not come within {self._timeout_s:g} s") from None
            is_whole = not message.get("more_body", False)
            return message

        await self.app(scope, receive_in_time, send)
