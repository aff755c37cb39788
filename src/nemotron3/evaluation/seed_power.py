"""What a comparison over seeds can see, said before it is made.

    smallest_detectable_over_seeds(3)                  # 3.3: standard deviations of the difference
    smallest_detectable_over_seeds(3, deviation=0.02)  # 0.065: 6.5 points

The runs of two systems are compared by the paired t-test over their seeds. Its power follows from
the noncentral t distribution, which is integrated here over the spread that a sample may have.
"""

import math

import numpy as np

from nemotron3.errors import ConfigError
from nemotron3.evaluation.distributions import t_quantile

_POINTS = 2000


def paired_t_power(
    num_seeds: int, effect: float, *, alpha: float = 0.05, num_comparisons: int = 1
) -> float:
    """The probability that the two-sided paired t-test finds a difference of this size.

    `effect` is in standard deviations of the difference over seeds. With several comparisons each
    is tested at alpha / number, as Holm's first step does: a lower bound of its power. Raises
    `ConfigError` for fewer than two seeds.
    """
    if num_seeds < 2:
        raise ConfigError(f"is {num_seeds}; a comparison over seeds needs 2", field="num_seeds")
    if not 0 < alpha < 1 or num_comparisons < 1:
        raise ConfigError(
            f"alpha is {alpha} of {num_comparisons} comparisons; give a number between 0 and 1, "
            "and 1 comparison or more"
        )
    degrees = num_seeds - 1
    bound = t_quantile(1 - alpha / num_comparisons, degrees)
    shift = abs(effect) * math.sqrt(num_seeds)
    # The deviation of a sample, over the true one, is chi / sqrt(degrees).
    width = (math.sqrt(degrees) + 9.0) / _POINTS
    chi = (np.arange(_POINTS) + 0.5) * width
    logs = (degrees - 1) * np.log(chi) - chi * chi / 2
    density = np.exp(logs - (degrees / 2 - 1) * math.log(2) - math.lgamma(degrees / 2))
    edge = bound * chi / math.sqrt(degrees)
    found = np.array([_below(shift - e) + _below(-shift - e) for e in edge.tolist()])
    return min(1.0, float((found * density).sum() * width))


def smallest_detectable_over_seeds(
    num_seeds: int,
    *,
    deviation: float = 1.0,
    alpha: float = 0.05,
    power: float = 0.8,
    num_comparisons: int = 1,
) -> float:
    """The smallest difference that so many seeds show with probability `power`.

    `deviation` is the standard deviation of the difference over seeds; 1 gives the answer in such
    deviations.
    """
    if not 0 < power < 1:
        raise ConfigError(f"is {power}; it must be between 0 and 1", field="power")
    low, high = 0.0, 1.0
    while _power(num_seeds, high, alpha, num_comparisons) < power:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if _power(num_seeds, middle, alpha, num_comparisons) < power:
            low = middle
        else:
            high = middle
    return high * deviation


def _power(num_seeds: int, effect: float, alpha: float, num_comparisons: int) -> float:
    return paired_t_power(num_seeds, effect, alpha=alpha, num_comparisons=num_comparisons)


def _below(z: float) -> float:
    """P(Z < z) of a normal variable."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
