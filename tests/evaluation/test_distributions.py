"""Student's t and binomials against SciPy and values of tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.evaluation.distributions import (
    binomial_probabilities,
    binomial_two_sided,
    t_quantile,
    t_two_sided,
)

DEGREES = (1, 2, 3, 4, 5, 7, 10, 29, 30, 100, 299)


@pytest.mark.parametrize(
    ("level", "degrees", "value"),
    [(0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 4, 2.7764), (0.9, 9, 1.8331), (0.99, 3, 5.8409)],
)
def test_quantiles_are_those_of_printed_tables(level, degrees, value):
    assert t_quantile(level, degrees) == pytest.approx(value, abs=5e-5)


def test_one_degree_is_cauchys_distribution():
    for statistic in (0.0, 0.3, 1.0, 7.0):
        assert t_two_sided(statistic, 1) == pytest.approx(1 - 2 / math.pi * math.atan(statistic))
    assert t_two_sided(-1.0, 1) == pytest.approx(0.5)


@pytest.mark.parametrize("degrees", DEGREES)
def test_t_agrees_with_scipy(degrees):
    stats = pytest.importorskip("scipy.stats")
    for statistic in (0.0, 0.1, 1.0, 2.5, 10.0):
        expected = 2 * stats.t.sf(statistic, degrees)
        assert t_two_sided(statistic, degrees) == pytest.approx(expected, abs=1e-12)
    for level in (0.01, 0.5, 0.9, 0.95, 0.999):
        expected = stats.t.ppf((1 + level) / 2, degrees)
        assert t_quantile(level, degrees) == pytest.approx(expected, rel=1e-9)


@given(degrees=st.integers(1, 60), level=st.floats(0.02, 0.98))
def test_quantile_and_probability_undo_each_other(degrees, level):
    assert 1 - t_two_sided(t_quantile(level, degrees), degrees) == pytest.approx(level, abs=1e-9)


@given(n=st.integers(0, 40), p=st.floats(0, 1))
def test_binomial_probabilities_are_those_of_counting(n, p):
    found = binomial_probabilities(n, p)
    expected = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.sum() == pytest.approx(1)


def test_two_sided_binomial_agrees_with_hand_and_scipy():
    assert binomial_two_sided(0, 0) == 1
    assert binomial_two_sided(1, 2) == 1
    assert binomial_two_sided(0, 5) == 2 / 32
    assert binomial_two_sided(1, 6) == 14 / 64
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 7, 30, 301):
        for k in range(0, n + 1, max(1, n // 9)):
            assert binomial_two_sided(k, n) == pytest.approx(stats.binomtest(k, n).pvalue)
