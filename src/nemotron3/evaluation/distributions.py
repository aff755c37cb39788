"""Student's t and binomial distributions, exact, without SciPy.

For a whole number of degrees of freedom the t distribution has a finite trigonometric series
(Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4).
"""

import math

import numpy as np
from numpy.typing import NDArray


def t_two_sided(statistic: float, degrees: int) -> float:
    """P(|T| >= |statistic|) of Student's t with so many degrees of freedom, 1 or more."""
    angle = math.atan2(math.sqrt(degrees), abs(statistic))
    return _share_beyond(math.pi / 2 - angle, degrees)


def t_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| <= t) = level, for a level in (0, 1)."""
    low, high = 0.0, math.pi / 2
    for _ in range(80):  # bisection of the angle, to the last bit of a float
        middle = (low + high) / 2
        if 1 - _share_beyond(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _share_beyond(angle: float, degrees: int) -> float:
    """P(|T| >= sqrt(degrees) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    # Odd: cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 + ...; even: 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ...
    term = cosine if degrees % 2 else 1.0
    total = 0.0 if degrees == 1 else term
    for power in range(2 + degrees % 2, degrees - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    inside = (angle + sine * total) * 2 / math.pi if degrees % 2 else sine * total
    return min(max(1 - inside, 0.0), 1.0)


def binomial_probabilities(n: int, p: float) -> NDArray[np.float64]:
    """P(X = 0), ..., P(X = n) of n draws that succeed with probability p."""
    if p in (0.0, 1.0):
        only = np.zeros(n + 1)
        only[n if p else 0] = 1.0
        return only
    counts = np.arange(n + 1)
    factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    choices = factorials[n] - factorials[counts] - factorials[n - counts]
    return np.exp(choices + counts * math.log(p) + (n - counts) * math.log1p(-p))


def binomial_two_sided(successes: int, n: int) -> float:
    """P of a result at least as far from n/2 as `successes` of n fair draws; 1 for no draws."""
    fewer = min(successes, n - successes)
    if 2 * fewer == n:
        return 1.0
    tail = sum(math.comb(n, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)
