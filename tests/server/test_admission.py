"""Slots, the queue before them and every time-out, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from server.admission import Admission, Answer, Timeouts
from server.chat import Delta, Event, Finish, Usage
from server.errors import AnswerTooLong, Busy, ClientGone, Draining, EngineError, EngineStalled, QueueTimeout, ServerError
from server.metrics import Metrics

pytestmark = pytest.mark.anyio
END = Finish("stop", Usage(3, 5))


def admission(slots: int = 1, waiting: int = 2, **seconds: float) -> Admission:
    return Admission(slots, waiting, replace(Timeouts(20, 20, 20, 20), **seconds), Metrics())


class Script:
    """Events, errors and waits in seconds, as an engine's generator; knows whether it was closed."""

    def __init__(self, *steps: Event | Exception | float) -> None:
        self.steps = steps
        self.started = self.ended = False

    async def __call__(self) -> AsyncGenerator[Event]:
        self.started = True
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.ended = True


async def read(answer: Answer) -> list[Event]:
    async with answer:
        await answer.start()
        return [event async for event in answer.events()]


async def failure(answer: Answer) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await read(answer)
    return caught.value


def sample(admission: Admission, name: str, **labels: str) -> float:
    return admission.metrics._registry.get_sample_value(f"trinity_{name}", labels) or 0.0


async def test_events_come_through_in_order_and_the_slot_comes_back() -> None:
    gate = admission()
    for _ in range(3):
        assert await read(Answer(gate, Script(Delta("a"), Delta("b"), END)())) == [Delta("a"), Delta("b"), END]
    assert sample(gate, "answers_total", outcome="stop") == 3
    assert sample(gate, "tokens_total", kind="completion") == 15


async def test_the_slot_is_free_before_the_client_has_read_the_end() -> None:
    gate = admission(waiting=0)
    async with Answer(gate, Script(Delta("a"), END)()) as first:
        await first.start()
        async for event in first.events():
            if event == END:
                assert await read(Answer(gate, Script(END)())) == [END]


async def test_who_waits_longest_is_next_and_nobody_who_comes_later_overtakes() -> None:
    gate = admission(waiting=9)
    order: list[str] = []
    most = 0

    async def ask(name: str) -> None:
        nonlocal most
        async with Answer(gate, Script(Delta(name), 0.01, END)()) as answer:
            await answer.start()
            order.append(name)
            most = max(most, int(sample(gate, "answers_in_flight")))
            async for _ in answer.events():
                pass
            if len(name) == 1:  # a newcomer in the very moment in which a slot comes free
                later.append(asyncio.create_task(ask(name + "'")))

    later: list[asyncio.Task[None]] = []
    await asyncio.gather(*(ask(name) for name in "abc"))
    await asyncio.gather(*later)
    assert (order, most) == (["a", "b", "c", "a'", "b'", "c'"], 1)
    assert sample(gate, "queue_length") == 0


async def test_the_queue_has_an_end_and_a_place_in_it_is_given_back() -> None:
    gate = admission(waiting=1, queue_s=0.05)
    async with Answer(gate, Script(Delta("a"), END)()) as first:
        await first.start()
        waits = asyncio.create_task(failure(Answer(gate, Script(END)())))
        await asyncio.sleep(0.01)
        assert sample(gate, "queue_length") == 1
        full = await failure(Answer(gate, Script(END)()))
        late = await waits
    assert (type(full), type(late)) == (Busy, QueueTimeout)
    assert "2 requests" in str(full) and "within 0.05 s" in str(late)
    assert sample(gate, "queue_length") == 0 and sample(gate, "answers_total", outcome="queue_full") == 1
    assert sample(gate, "answers_total", outcome="queue_timeout") == 1
    assert await read(Answer(gate, Script(END)())) == [END]


async def test_a_slot_that_comes_in_the_moment_its_waiter_leaves_goes_to_the_next() -> None:
    gate = admission()
    first, leaving, staying = (Answer(gate, Script(END)()) for _ in range(3))
    await gate.enter(first)
    turns = [asyncio.create_task(gate.enter(answer)) for answer in (leaving, staying)]
    await asyncio.sleep(0.01)
    gate.leave(first)  # hands the slot to `leaving`, which has not run yet
    turns[0].cancel()
    await asyncio.wait_for(turns[1], 1)
    assert turns[0].cancelled()
    gate.leave(staying)
    assert await read(Answer(gate, Script(END)())) == [END]


@pytest.mark.parametrize(
    ("seconds", "steps", "kind", "words"),
    [
        ({"first_token_s": 0.05}, (9.0, Delta("a"), END), EngineStalled, "nothing for 0.05 s"),
        ({"stall_s": 0.05}, (Delta("a"), 9.0, END), EngineStalled, "nothing for 0.05 s"),
        ({"total_s": 0.1}, (Delta("a"), *(0.03, Delta("b")) * 9, END), AnswerTooLong, "longer than 0.1 s"),
        ({}, (Delta("a"),), EngineError, "broke off"),
        ({}, (), EngineError, "broke off"),
        ({}, (EngineError("gone"),), EngineError, "gone"),
    ],
)
async def test_an_answer_that_takes_too_long_or_breaks_off_is_an_error_and_its_engine_is_told(
    seconds: dict[str, float], steps: tuple[Event | float, ...], kind: type[ServerError], words: str
) -> None:
    gate = admission()
    gate.timeouts = replace(gate.timeouts, **seconds)
    script = Script(*steps)
    error = await failure(Answer(gate, script()))
    assert type(error) is kind and words in str(error)
    assert script.ended
    assert await read(Answer(gate, Script(END)())) == [END]
    counted = sum(sample(gate, "engine_errors_total", code=code) for code in ("engine_stalled", "engine_failed"))
    assert counted == issubclass(kind, EngineError), "an answer that is only long is no failure of the engine"


async def test_a_slow_first_token_is_no_stall_and_a_wait_in_the_queue_counts_for_none() -> None:
    gate = admission(first_token_s=0.4, stall_s=0.05, total_s=0.5)
    answers = [read(Answer(gate, Script(0.2, Delta("a"), END)())) for _ in range(3)]
    assert await asyncio.gather(*answers) == [[Delta("a"), END]] * 3


async def test_who_leaves_is_counted_as_gone_and_the_engine_is_told() -> None:
    gate = admission()
    script = Script(Delta("a"), 9.0, END)
    reading = asyncio.create_task(read(Answer(gate, script())))
    await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert script.ended
    with pytest.raises(ClientGone):
        async with Answer(gate, Script(END)()) as answer:
            await answer.start()
            raise ClientGone("hung up")
    assert sample(gate, "answers_total", outcome="client_gone") == 2
    assert sample(gate, "answers_in_flight") == 0


async def test_a_drain_lets_answers_end_refuses_who_waits_and_takes_nothing_new() -> None:
    gate = admission()
    under_way = asyncio.create_task(read(Answer(gate, Script(Delta("a"), 0.2, END)())))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(failure(Answer(gate, Script(END)())))
    await asyncio.sleep(0.01)
    draining = asyncio.create_task(gate.drain(5))
    assert isinstance(await waiting, Draining)
    assert isinstance(await failure(Answer(gate, Script(END)())), Draining)
    assert not under_way.done() and not draining.done()
    assert await under_way == [Delta("a"), END]
    await asyncio.wait_for(draining, 1)


async def test_a_drain_that_lasts_too_long_ends_answers_with_an_error_wherever_they_are() -> None:
    gate = admission(slots=3)
    reading = [asyncio.create_task(failure(Answer(gate, Script(*steps)()))) for steps in ((9.0, END), (Delta("a"), 9.0, END))]
    held = Answer(gate, Script(Delta("a"), Delta("b"), END)())
    await held.start()
    events = held.events()
    assert await anext(events) == Delta("a")  # its client is being written to
    await gate.drain(0.05, farewell_s=0.01)
    assert [type(error) for error in await asyncio.gather(*reading)] == [Draining, Draining]
    with pytest.raises(Draining):
        await anext(events)
    await held.aclose()


async def test_an_idle_drain_is_over_at_once() -> None:
    await asyncio.wait_for(admission().drain(60), 1)
