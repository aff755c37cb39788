"""Timing side by side: peers take turns, so that a slow minute of the machine hits all of them.

A contestant is a callable that does its work once and returns the seconds it took. It times itself,
since what must not count (a prompt before decoding, the start of another program) differs.
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
"""Before a turn: the threads of some programs spin for a fifth of a second after their work."""
TURN_S = 0.5
"""Of work that counts, at least: a processor that has slept through a pause is slow for tens of
milliseconds, and a single short prompt would be over by then."""


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in seconds."""

    seconds: tuple[float, ...]

    def rate(self, amount: float) -> dict[str, float]:
        """Amount per second: median, lowest and highest."""
        rates = [amount / s for s in self.seconds]
        return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def interleave(
    contestants: Mapping[str, Contestant], *, repeats: int, warmups: int = 1
) -> dict[str, Sample]:
    """Run all in turn, `repeats` times after warming up."""
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
    """All peers in another order each round.

    What one leaves behind, such as threads that still spin or a full cache, is borne by whoever
    comes next, and that must not always be the same one.
    """
    chance = random.Random(0)
    for _ in range(rounds):
        yield chance.sample(peers, len(peers))


def timed(action: Callable[[], object]) -> Contestant:
    """A contestant all of whose work counts."""

    def run() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return run


def warmed(action: Callable[[], object]) -> Contestant:
    """A contestant that does its work once before it counts, and then for `TURN_S` at least.

    What it finds in the caches is then its own, whoever came before; llama.cpp's programs warm up
    in the same way. The seconds are those of one time.
    """

    def run_warm() -> float:
        action()
        times, start = 0, time.perf_counter()
        while not times or time.perf_counter() - start < TURN_S:
            action()
            times += 1
        return (time.perf_counter() - start) / times

    return run_warm
