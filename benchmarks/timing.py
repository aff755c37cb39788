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
    """A contestant that does its work twice, of which the second time counts.

    What it finds in the caches is then its own, whoever came before; llama.cpp's programs warm up
    in the same way.
    """
    run = timed(action)

    def run_warm() -> float:
        action()
        return run()

    return run_warm
