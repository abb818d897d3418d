"""Makes sample.jsonl: English schedules and the cron expressions that they mean, one right answer each.

    python data/make_sample.py > data/sample.jsonl

A small formal language that a base model does not know and whose answers can be checked letter by letter. Five fields:
minute, hour, day of the month, month, day of the week (Sunday is 0). The language never names a day of the month
together with a day of the week, which cron reads as "or". Own work, CC0: whoever runs this gets the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import NamedTuple

SEED = 20
NUM_RECORDS = 1600

WEEKDAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
MINUTE_STEPS = (2, 3, 4, 5, 6, 10, 12, 15, 20, 30)
OPENINGS = ("", "", "Run ", "Remind me ")


class Clock(NamedTuple):
    """When in the day: words, minute field, hour field."""

    words: str
    minute: str
    hour: str


class Days(NamedTuple):
    """On which days: words, day of the month, month, day of the week."""

    words: str
    day: str
    month: str
    weekday: str


def clock(chance: random.Random) -> Clock:
    kind = chance.choices(("time", "minutes", "hourly"), (84, 8, 8))[0]
    minute = chance.randrange(60)
    if kind == "minutes":
        step = chance.choice(MINUTE_STEPS)
        return Clock(f"every {step} minutes", f"*/{step}", "*")
    if kind == "hourly":
        return Clock(f"every hour at minute {minute}", str(minute), "*")
    hour = chance.randrange(24)
    return Clock(f"at {hour:02}:{minute:02}", str(minute), str(hour))


def days(chance: random.Random) -> Days:
    kind = chance.choices(("all", "weekday", "week", "day", "date"), (14, 30, 10, 20, 26))[0]
    weekday, month = chance.randrange(7), chance.randrange(12)
    name, month_name = WEEKDAYS[weekday], MONTHS[month]
    fields = ("*", "*", "*")
    match kind:
        case "all":
            words = ["every day", "daily"]
        case "weekday":
            words, fields = [f"every {name}", f"on {name}s"], ("*", "*", str(weekday))
        case "week":
            words, fields = ["on weekdays", "every weekday"], ("*", "*", "1-5")
        case "day":
            day = str(chance.randint(1, 28))
            words, fields = [f"on day {day} of every month", f"monthly on day {day}"], (day, "*", "*")
        case "date":
            day = str(chance.randint(1, DAYS_IN_MONTH[month]))
            words, fields = [f"on {month_name} {day}", f"every year on {month_name} {day}"], (day, str(month + 1), "*")
    return Days(chance.choice(words), *fields)


def schedules(chance: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (English, cron) pairs."""
    while True:
        time, date = clock(chance), days(chance)
        parts = [date.words, time.words] if chance.random() < 0.6 else [time.words, date.words]
        text = chance.choice(OPENINGS) + " ".join(parts)
        ending = chance.choice(("", "", "."))
        yield f"{text[0].upper()}{text[1:]}{ending}", f"{time.minute} {time.hour} {date.day} {date.month} {date.weekday}"


def lines() -> Iterator[str]:
    """The sample's lines. Chance decides their order; no English text comes twice."""
    seen: set[str] = set()
    for text, cron in schedules(random.Random(SEED)):
        if text not in seen:
            seen.add(text)
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": cron}]
            yield json.dumps({"messages": messages})
        if len(seen) == NUM_RECORDS:
            return


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines())
