"""Events to be placed on a day: durations, windows, an order, and times that are taken.

    Taken: 10:00-11:00. Plan alpha 60 min 9:00-12:00.   ->   alpha 09:00-10:00

Any plan that keeps every constraint is right; a plan was drawn before its constraints, so there is
one. At difficulty 0 one or two events on whole hours; at 1 six events, quarters of hours, tight
windows and events that follow each other.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from random import Random
from typing import Any, ClassVar, cast

from nemotron3.environments.answers import answer_turn, with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import WORDS
from nemotron3.text import AssistantMessage

DAY = (8 * 60, 18 * 60)
"""The minutes of a day between which everything lies."""
_LINE = re.compile(r"(\w+) (\d{1,2}):(\d\d)-(\d{1,2}):(\d\d)", re.ASCII)

Span = tuple[int, int]
"""Start and end in minutes of the day."""
Event = Mapping[str, Any]
"""name, duration, window [start, end], and `after`: the name of one that must end before."""


class CalendarScheduling(Environment):
    """Plans of a day that keep windows, durations, order and taken times."""

    name: ClassVar[str] = "calendar_scheduling"

    def draw(self, random: Random) -> Row:
        """A plan, then what it must keep."""
        unit = 60 if self.difficulty < 0.34 else 30 if self.difficulty < 0.67 else 15
        num_events = random.randint(1 + round(2 * self.difficulty), 2 + round(4 * self.difficulty))
        num_taken = random.randint(1, 2)
        spans = _spans(random, num_events + num_taken, unit)
        random.shuffle(spans)
        taken, plan = sorted(spans[:num_taken]), spans[num_taken:]
        names = random.sample(WORDS, num_events)
        slack = round((3 - 2 * self.difficulty) * 60 / unit)
        events = [
            {
                "name": name,
                "duration": end - start,
                "window": _window(random, start, end, slack, unit),
            }
            for name, (start, end) in zip(names, plan, strict=True)
        ]
        if num_events > 2 and random.random() < self.difficulty:
            by_start = sorted(range(num_events), key=lambda i: plan[i])
            events[by_start[-1]]["after"] = names[by_start[0]]
        wanted = ", ".join(map(_told, events))
        return self.row(
            with_format(
                f"Taken: {', '.join(map(_written, taken))}. Plan {wanted}.",
                "Answer with a line for each event, such as: lunch 12:00-13:00",
                self.difficulty,
            ),
            taken=[list(span) for span in taken],
            events=events,
            plan=[f"{n} {_written(span)}" for n, span in zip(names, plan, strict=True)],
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """What is free, then the plan that the task was made from."""
        taken = [minute for span in field_of(row, "taken", list) for minute in span]
        ends = [DAY[0], *taken, DAY[1]]
        free = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]
        reasoning = f"free: {', '.join(map(_written, free))}"
        return [answer_turn("\n".join(field_of(row, "plan", list)), reasoning)]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for a line for each event, once, that keeps every constraint."""
        del session
        events = cast(list[Event], field_of(row, "events", list))
        taken = cast(list[Span], [tuple(span) for span in field_of(row, "taken", list)])
        plan = read_plan(response.answer)
        is_whole = plan is not None and sorted(plan) == sorted(event["name"] for event in events)
        components = {"format": plan is not None, "events": is_whole}
        placed = plan if plan is not None and is_whole else {}
        components |= {
            "duration": is_whole and all(_lasts(placed[e["name"]], e) for e in events),
            "window": is_whole and all(_is_inside(placed[e["name"]], e["window"]) for e in events),
            "order": is_whole
            and all(
                placed[e["after"]][1] <= placed[e["name"]][0] for e in events if e.get("after")
            ),
            "free": is_whole and not _overlap([*placed.values(), *taken]),
        }
        return Verification.all_of(components, answer=response.answer[:80])


def read_plan(text: str) -> dict[str, Span] | None:
    """Lines such as `lunch 09:00-10:30`; None for anything else, and for a name twice."""
    plan: dict[str, Span] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None or match[1] in plan or int(match[3]) > 59 or int(match[5]) > 59:
            return None
        start, end = (int(match[i]) * 60 + int(match[i + 1]) for i in (2, 4))
        plan[match[1]] = (start, end)
    return plan or None


def _lasts(span: Span, event: Event) -> bool:
    return span[1] - span[0] == event["duration"]


def _is_inside(span: Span, window: list[int]) -> bool:
    return window[0] <= span[0] and span[1] <= window[1]


def _overlap(spans: list[Span]) -> bool:
    ordered = sorted(spans)
    return any(left[1] > right[0] for left, right in pairwise(ordered))


def _spans(random: Random, count: int, unit: int) -> list[Span]:
    """Spans of one or two units (up to 90 minutes), none of which overlap."""
    num_units = (DAY[1] - DAY[0]) // unit
    lengths = [random.randint(1, 2 if unit >= 30 else 4) for _ in range(count)]
    while sum(lengths) > num_units:
        lengths[lengths.index(max(lengths))] -= 1
    free = num_units - sum(lengths)
    cuts = sorted(random.randint(0, free) for _ in range(count))
    spans: list[Span] = []
    used = 0
    for cut, length in zip(cuts, lengths, strict=True):
        start = DAY[0] + (cut + used) * unit
        spans.append((start, start + length * unit))
        used += length
    return spans


def _window(random: Random, start: int, end: int, slack: int, unit: int) -> list[int]:
    before, after = (random.randint(0, slack) * unit for _ in range(2))
    return [max(DAY[0], start - before), min(DAY[1], end + after)]


def _written(span: tuple[int, int] | list[int]) -> str:
    return "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in span)


def _told(event: Event) -> str:
    after = f" after {event['after']}" if event.get("after") else ""
    return f"{event['name']} {event['duration']} min {_written(event['window'])}{after}"
