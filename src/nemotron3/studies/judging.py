"""Differences between arms over paired seeds, and verdicts on them."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nemotron3.evaluation.statistics import Verdict, judge

K = TypeVar("K", bound=Hashable)
Pairs = tuple[Sequence[float], Sequence[float]]
"""Numbers of a first and a second arm, seed by seed."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A second arm against a first, with a verdict on the claim that its numbers are higher."""

    num_seeds: int
    first: float
    """Mean of the first."""
    second: float
    """Mean of the second."""
    difference: float
    """`second - first`."""
    low: float
    """Of the interval of the difference, simultaneous over the family at 95%."""
    high: float
    p_value: float
    """Corrected by Holm over the family."""
    verdict: str


def judge_family(
    pairs: Mapping[K, Pairs], *, smallest_effect: float, margin: float = 0.0
) -> dict[K, Judgement]:
    """One family of comparisons by the paired t-test over seeds.

    With a `margin` the claim is that the second is higher than the first minus it. Comparisons
    without a pair are left out; one pair alone shows nothing, so the verdict cannot be told.
    """
    keys = {str(place): key for place, key in enumerate(pairs)}
    testable = {
        place: ([value - margin for value in pairs[key][0]], pairs[key][1])
        for place, key in keys.items()
        if len(pairs[key][0]) > 1
    }
    judged = judge(testable, smallest_effect=smallest_effect, over_seeds=True)
    found: dict[K, Judgement] = {}
    for place, key in keys.items():
        first, second = pairs[key]
        if not first:
            continue
        a, b = mean(first), mean(second)
        one = judged.get(place)
        interval = None if one is None else one.comparison.interval
        found[key] = Judgement(
            num_seeds=len(first),
            first=a,
            second=b,
            difference=b - a,
            low=-math.inf if interval is None else interval.low - margin,
            high=math.inf if interval is None else interval.high - margin,
            p_value=1.0 if one is None else one.adjusted_p,
            verdict=(Verdict.CANNOT_BE_TOLD if one is None else one.verdict).value,
        )
    return found


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
