"""Timing side by side: contestants take turns, so that a slow minute of the machine affects all.

A contestant is a callable that does its work once and returns the seconds that count. It times
itself, since the work that does not count (a prompt before decoding, the start of another program)
differs.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Contestant = Callable[[], float]
PAUSE_S = 0.3
"""Pause before a turn: threads of some programs spin for a fifth of a second after their work."""
TURN_S = 0.5
"""Shortest time of work that counts: after a pause a processor is slow for tens of milliseconds,
longer than a single short prompt takes."""


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one contestant, in seconds."""

    seconds: tuple[float, ...]

    def rate(self, amount: float) -> dict[str, float]:
        """Amount per second: median, lowest and highest."""
        rates = [amount / s for s in self.seconds]
        return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}

    @property
    def median(self) -> float:
        """The median in seconds."""
        return statistics.median(self.seconds)


def interleave(
    contestants: Mapping[str, Contestant], *, repeats: int, warmups: int = 1
) -> dict[str, Sample]:
    """Run all contestants in turns, `repeats` times after warming up."""
    for _ in range(warmups):
        for run in contestants.values():
            run()
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for order in turns(names, rounds=repeats):
        for name in order:
            time.sleep(PAUSE_S)
            seconds[name].append(contestants[name]())
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def turns(peers: Sequence[T], *, rounds: int) -> Iterator[list[T]]:
    """All contestants, in another order in each round.

    A contestant may slow down the next one, by threads that still spin or by a full cache, and that
    must not always be the same one.
    """
    chance = random.Random(0)
    for _ in range(rounds):
        yield chance.sample(peers, len(peers))


def timed(action: Callable[[], object]) -> Contestant:
    """A contestant whose work counts completely."""

    def run() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return run


def warmed(action: Callable[[], object]) -> Contestant:
    """A contestant that does its work once without counting, and then repeats it for `TURN_S`.

    The caches then hold its own data, whichever contestant was before; llama.cpp's programs warm up
    in the same way. The seconds are those of one repetition.
    """

    def run_warm() -> float:
        action()
        times, start = 0, time.perf_counter()
        while not times or time.perf_counter() - start < TURN_S:
            action()
            times += 1
        return (time.perf_counter() - start) / times

    return run_warm
