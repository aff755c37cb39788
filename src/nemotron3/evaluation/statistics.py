"""The statistics of comparisons: intervals, paired tests, several at once, power, a verdict.

    both = compare_paired(rewards_before, rewards_after)        # the same tasks in the same order
    both.difference, both.interval, both.p_value

    findings = judge({"math": (before, after), ...}, smallest_effect=0.05)
    findings["math"].verdict, findings["math"].reason

Two systems are compared on the same tasks, because tasks differ more than systems do. Rewards of 0
and 1 are compared by the exact test of McNemar, others by a sign-flip test: both hold for any
number of tasks and any distribution. Of several comparisons at once some look significant by
chance, so their p-values are corrected (Holm). Runs with different seeds are compared by
`compare_seeds`; tasks say nothing of how another seed would have trained.

Before measuring, `smallest_detectable` says which difference so many tasks can show. Without it
"no significant difference" may mean that there was none, or that nobody could have seen one: a
verdict tells these apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from nemotron3.errors import ConfigError, DataError
from nemotron3.evaluation.distributions import binomial_two_sided, t_quantile, t_two_sided

Array = NDArray[np.float64]

_RESAMPLES = 10_000
_EXACT_FLIPS = 14
"""Differences up to which all 2^n assignments of signs are counted."""
_CHUNK = 2**22
"""Numbers that a resampling draws at once."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float
    level: float
    """Its confidence, such as 0.95."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A second system against a first, on the same tasks or seeds."""

    n: int
    """Tasks, or seeds."""
    first: float
    """Mean of the first."""
    second: float
    """Mean of the second."""
    difference: float
    """`second - first`."""
    interval: Interval
    """Of the difference."""
    p_value: float
    """Of no difference, two-sided, before any correction."""
    test: str
    """How it was computed, such as "McNemar, exact"."""


class Verdict(StrEnum):
    """What a comparison says of the claim that the second system is better."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    CANNOT_BE_TOLD = "cannot be told"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A comparison among others, with its verdict."""

    comparison: Comparison
    """Its interval is simultaneous: all of the family's cover the truth with the level wanted."""
    adjusted_p: float
    """Holm's, over the family."""
    verdict: Verdict
    reason: str


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Of a proportion (Wilson 1927); within [0, 1], and not empty where all or none succeeded."""
    if not 0 <= successes <= n or n < 1:
        raise DataError(f"{successes} successes of {n}; give 0 to n of 1 or more")
    z = _normal_quantile(level)
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return Interval(low=low, high=high, level=level)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, num_resamples: int = _RESAMPLES, seed: int = 0
) -> Interval:
    """Of a mean, by the percentiles of resampled means; the same `seed` gives the same interval."""
    _check_level(level)
    given = _finite(values, "values")
    random = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    step = max(1, _CHUNK // len(given))
    for start in range(0, num_resamples, step):
        count = min(step, num_resamples - start)
        drawn = given[random.integers(len(given), size=(count, len(given)))]
        means[start : start + count] = drawn.mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level)


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Wilson's where all values are 0 or 1, else the bootstrap's."""
    given = _finite(values, "values")
    if is_binary(given):
        return wilson_interval(int(given.sum()), len(given), level=level)
    return bootstrap_interval(values, level=level)


def is_binary(values: Sequence[float] | Array) -> bool:
    """Whether all values are 0 or 1."""
    given = np.asarray(values, dtype=float)
    return bool(((given == 0) | (given == 1)).all())


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    The counts are of tasks that only the one or only the other system solved; the rest says nothing
    of a difference.
    """
    if only_first < 0 or only_second < 0:
        raise DataError(f"counts of {only_first} and {only_second} tasks; give 0 or more")
    return binomial_two_sided(only_first, only_first + only_second)


def sign_flip(
    differences: Sequence[float], *, num_resamples: int = _RESAMPLES, seed: int = 0
) -> float:
    """Two-sided p-value of a mean difference of 0, by flipping signs of paired differences.

    Exact up to 14 differences that are not 0. Beyond that signs are drawn, and the p-value is at
    least 1 / (num_resamples + 1).
    """
    given = _finite(differences, "differences")
    given = given[given != 0]
    n = len(given)
    # What equals the observed sum up to rounding is as extreme as it.
    bound = abs(given.sum()) - 1e-9 * np.abs(given).sum()
    if n <= _EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ given) >= bound).mean())
    random = np.random.default_rng(seed)
    extreme = 0
    step = max(1, _CHUNK // n)
    for start in range(0, num_resamples, step):
        signs = random.integers(0, 2, size=(min(step, num_resamples - start), n)) * 2 - 1
        extreme += int((np.abs(signs @ given) >= bound).sum())
    return (extreme + 1) / (num_resamples + 1)


def compare_paired(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95
) -> Comparison:
    """Rewards of two systems on the same tasks, in the same order.

    Where all are 0 or 1: McNemar's exact test, and the interval of Bonett and Price (2012). Else a
    sign-flip test, and a bootstrap over the tasks, whose interval is infinite where differences
    have no spread. Raises `DataError` for none, or of two lengths.
    """
    a, b = _pair(first, second)
    differences = b - a
    if is_binary(a) and is_binary(b):
        only_first, only_second = int((differences < 0).sum()), int((differences > 0).sum())
        interval = _paired_proportions(only_first, only_second, len(a), level)
        p_value, test = mcnemar(only_first, only_second), "McNemar, exact"
    else:
        if _has_spread(differences, a, b):
            interval = bootstrap_interval(differences.tolist(), level=level)
        else:
            _check_level(level)
            interval = Interval(low=-math.inf, high=math.inf, level=level)
        p_value, test = sign_flip(differences.tolist()), "sign flips"
    return _comparison(a, b, interval, p_value, test)


def compare_seeds(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95
) -> Comparison:
    """One number of each of several runs, paired by their seeds: the paired t-test.

    Differences that are all alike have no spread to judge by: the interval is infinite then, and
    the p-value 1. Raises `DataError` for fewer than two pairs.
    """
    _check_level(level)
    a, b = _pair(first, second)
    if len(a) < 2:
        raise DataError(f"{len(a)} pair of seeds; a comparison needs 2, and 3 to say much")
    differences = b - a
    mean, degrees = float(differences.mean()), len(a) - 1
    error = float(differences.std(ddof=1)) / math.sqrt(len(a))
    if not _has_spread(differences, a, b):
        interval = Interval(low=-math.inf, high=math.inf, level=level)
        return _comparison(a, b, interval, 1.0, "paired t (no spread)")
    half = t_quantile(level, degrees) * error
    interval = Interval(low=mean - half, high=mean + half, level=level)
    return _comparison(a, b, interval, t_two_sided(mean / error, degrees), "paired t")


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the order given."""
    for value in p_values:
        if not 0 <= value <= 1:
            raise DataError(f"a p-value is {value}; give numbers from 0 to 1")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def judge(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    smallest_effect: float = 0.05,
    alpha: float = 0.05,
    over_seeds: bool = False,
) -> dict[str, Finding]:
    """Whether each second system is better than its first: one family of comparisons.

    The chance that any of the verdicts "holds" is wrong is at most `alpha`. A claim "does not hold"
    where the second is significantly worse, or the interval, at level 1 - alpha / number, excludes
    an improvement of `smallest_effect`: state the smallest improvement that would matter before
    looking. All else "cannot be told". `over_seeds` compares runs instead of tasks.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"is {alpha}; it must be between 0 and 1", field="alpha")
    if not smallest_effect > 0:
        raise ConfigError(f"is {smallest_effect}; it must be above 0", field="smallest_effect")
    if not pairs:
        return {}
    compare = compare_seeds if over_seeds else compare_paired
    level = 1 - alpha / len(pairs)
    found = {name: compare(a, b, level=level) for name, (a, b) in pairs.items()}
    adjusted = holm([each.p_value for each in found.values()])
    findings: dict[str, Finding] = {}
    for (name, comparison), p_value in zip(found.items(), adjusted, strict=True):
        verdict, reason = _verdict(comparison, p_value, smallest_effect, alpha)
        findings[name] = Finding(
            comparison=comparison, adjusted_p=p_value, verdict=verdict, reason=reason
        )
    return findings


def _verdict(
    comparison: Comparison, p_value: float, smallest_effect: float, alpha: float
) -> tuple[Verdict, str]:
    difference, interval = comparison.difference, comparison.interval
    said = f"{difference:+.3f} (p = {p_value:.2g})"
    if p_value <= alpha:
        if difference > 0:
            return Verdict.HOLDS, f"better by {said}"
        return Verdict.DOES_NOT_HOLD, f"worse by {said}"
    if interval.high < smallest_effect:
        return (
            Verdict.DOES_NOT_HOLD,
            f"{said}; an improvement of {smallest_effect:g} is excluded: at most "
            f"{interval.high:+.3f}",
        )
    if math.isinf(interval.high):
        return Verdict.CANNOT_BE_TOLD, _without_spread(comparison)
    return (
        Verdict.CANNOT_BE_TOLD,
        f"{said}; between {interval.low:+.3f} and {interval.high:+.3f}, too wide for "
        f"n = {comparison.n}",
    )


def _without_spread(comparison: Comparison) -> str:
    if comparison.n < 2:
        return f"{comparison.difference:+.3f} on one task, which tells nothing of others"
    of, differ = "tasks", "models"
    if comparison.test.startswith("paired t"):
        of, differ = "seeds", "runs"
    return (
        f"{comparison.difference:+.3f} for every one of {comparison.n} {of}, without spread: are "
        f"these different {differ}?"
    )


def _has_spread(values: Array, *of: Array) -> bool:
    """Whether values differ by more than rounding, of numbers as large as those in `of`."""
    largest = max(float(np.abs(each).max()) for each in of)
    return float(np.ptp(values)) > 1e-12 * largest


def _comparison(a: Array, b: Array, interval: Interval, p_value: float, test: str) -> Comparison:
    return Comparison(
        n=len(a),
        first=float(a.mean()),
        second=float(b.mean()),
        difference=float((b - a).mean()),
        interval=interval,
        p_value=p_value,
        test=test,
    )


def _paired_proportions(only_first: int, only_second: int, n: int, level: float) -> Interval:
    """Bonett and Price (2012): Wald's interval with one more task on either side."""
    z = _normal_quantile(level)
    p, q = (only_second + 1) / (n + 2), (only_first + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval(low=max(-1.0, p - q - half), high=min(1.0, p - q + half), level=level)


def _normal_quantile(level: float) -> float:
    _check_level(level)
    return NormalDist().inv_cdf((1 + level) / 2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"is {level}; it must be between 0 and 1", field="level")


def _pair(first: Sequence[float], second: Sequence[float]) -> tuple[Array, Array]:
    if len(first) != len(second):
        raise DataError(
            f"{len(first)} values are compared with {len(second)}; pairs are of the same tasks, in "
            "the same order"
        )
    return _finite(first, "the first"), _finite(second, "the second")


def _finite(values: Sequence[float] | Array, what: str) -> Array:
    given = np.asarray(values, dtype=float)
    if given.ndim != 1 or not len(given):
        raise DataError(f"{what}: no values; give one or more")
    if not np.isfinite(given).all():
        place = int(np.flatnonzero(~np.isfinite(given))[0])
        raise DataError(f"{what}: value {place} is {given[place]}; give finite numbers")
    return given
