"""What a comparison can see, said before it is made.

    smallest_detectable(500, base_rate=0.4, num_comparisons=8)      # 0.114...: 11 points

Two systems of rewards 0 and 1 are compared on n tasks by the exact test of McNemar. Only tasks on
which they disagree count, so the power depends on how many those are. Sampled answers at
temperature 1 disagree even where the systems are equal: unless `discordance` is known from a trial,
the answers of the two are taken as independent given their rates, which is the cautious assumption
of the usual ones.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nemotron3.errors import ConfigError
from nemotron3.evaluation.distributions import binomial_probabilities, binomial_two_sided


def mcnemar_power(
    n: int,
    *,
    base_rate: float,
    difference: float,
    discordance: float | None = None,
    alpha: float = 0.05,
    num_comparisons: int = 1,
) -> float:
    """The probability that the exact test finds an improvement of `difference` with n tasks.

    `base_rate` is the share that the first system solves, `discordance` that of tasks which only
    one of the two solves. With several comparisons each is tested at alpha / number, as Holm's
    first step does: a lower bound of its power. Raises `ConfigError` for rates that cannot be.
    """
    _check(n, base_rate, alpha, num_comparisons)
    improved = base_rate + difference
    if not 0 < difference <= 1 - base_rate:
        raise ConfigError(
            f"is {difference}; above a base rate of {base_rate} it lies in (0, {1 - base_rate:g}]",
            field="difference",
        )
    if discordance is None:
        discordance = base_rate * (1 - improved) + (1 - base_rate) * improved
    only_first = (discordance - difference) / 2
    only_second = (discordance + difference) / 2
    slack = 1e-12
    if not (-slack <= only_first <= base_rate + slack and only_second <= 1 - base_rate + slack):
        raise ConfigError(
            f"is {discordance}; with a base rate of {base_rate} and a difference of {difference} "
            f"it lies in [{difference:g}, {_most_discordance(base_rate, difference):g}]",
            field="discordance",
        )
    share = min(max(only_second / discordance, 0.0), 1.0)
    disagreements = binomial_probabilities(n, min(discordance, 1.0))
    bounds = _least_wins(n, alpha / num_comparisons)
    power = 0.0
    for count in np.flatnonzero(disagreements > 1e-12).tolist():
        if bounds[count] <= count:
            wins = binomial_probabilities(count, share)
            power += float(disagreements[count] * wins[bounds[count] :].sum())
    return min(power, 1.0)


def smallest_detectable(
    n: int,
    *,
    base_rate: float,
    discordance: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
    num_comparisons: int = 1,
) -> float | None:
    """The smallest improvement that n tasks show with probability `power`; None where none is."""
    if not 0 < power < 1:
        raise ConfigError(f"is {power}; it must be between 0 and 1", field="power")
    _check(n, base_rate, alpha, num_comparisons)

    def found(difference: float) -> float:
        return mcnemar_power(
            n,
            base_rate=base_rate,
            difference=difference,
            discordance=discordance,
            alpha=alpha,
            num_comparisons=num_comparisons,
        )

    low, high = 0.0, 1 - base_rate
    if discordance is not None:
        high = min(high, discordance, 2 * (1 - base_rate) - discordance)
    if high <= 0 or found(high) < power:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high


@lru_cache(maxsize=8)
def _least_wins(n: int, alpha: float) -> NDArray[np.int64]:
    """For 0 to n disagreements: the wins from which the test is significant; one more for never."""
    bounds = np.empty(n + 1, dtype=np.int64)
    least = 1
    for count in range(n + 1):
        least = max(least, count // 2 + 1)
        while least <= count and binomial_two_sided(count - least, count) > alpha:
            least += 1
        bounds[count] = least if least <= count else count + 1
    return bounds


def _most_discordance(base_rate: float, difference: float) -> float:
    return min(2 * base_rate + difference, 2 * (1 - base_rate) - difference)


def _check(n: int, base_rate: float, alpha: float, num_comparisons: int) -> None:
    if n < 1 or num_comparisons < 1:
        raise ConfigError(f"{n} tasks and {num_comparisons} comparisons; both must be 1 or more")
    for name, value in (("base_rate", base_rate), ("alpha", alpha)):
        if not 0 <= value < 1 or (name == "alpha" and value == 0):
            raise ConfigError(f"is {value}; it must be between 0 and 1", field=name)
