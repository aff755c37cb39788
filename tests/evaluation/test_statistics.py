"""Intervals, tests and verdicts: hand-computed values, SciPy, and what holds for any data."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import ConfigError, DataError
from nemotron3.evaluation.statistics import (
    Verdict,
    bootstrap_interval,
    compare_paired,
    compare_seeds,
    holm,
    judge,
    mcnemar,
    mean_interval,
    sign_flip,
    wilson_interval,
)

rewards = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12)


def solved(both, only_first, only_second, neither):
    """Rewards of two systems with so many tasks of each kind."""
    first = [1.0] * both + [1.0] * only_first + [0.0] * only_second + [0.0] * neither
    second = [1.0] * both + [0.0] * only_first + [1.0] * only_second + [0.0] * neither
    return first, second


def test_wilson_is_that_of_textbooks():
    found = wilson_interval(8, 10)  # Wallis (2013), table: 0.4902 to 0.9433
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 20).low == 0
    assert wilson_interval(0, 20).high == pytest.approx(0.16113, abs=5e-6)
    assert wilson_interval(20, 20).high == 1


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(level):
    stats = pytest.importorskip("scipy.stats")
    for n, k in ((1, 0), (1, 1), (7, 3), (300, 41), (300, 300)):
        expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
        found = wilson_interval(k, n, level=level)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_bootstrap_is_that_of_the_normal_for_many_values():
    values = np.random.default_rng(1).normal(0.3, 2.0, size=2000).tolist()
    found = bootstrap_interval(values)
    half = 1.96 * np.std(values) / math.sqrt(2000)
    assert (found.low, found.high) == pytest.approx(
        (np.mean(values) - half, np.mean(values) + half), abs=0.1 * half
    )
    assert bootstrap_interval(values) == found
    assert bootstrap_interval(values, seed=1) != found


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = bootstrap_interval(random.beta(0.5, 1.5, size=60).tolist(), num_resamples=500)
        covered += found.low <= 0.25 <= found.high
    assert 0.88 < covered / 200 <= 1


@given(values=rewards)
def test_intervals_hold_the_mean(values):
    found = mean_interval(values)
    assert found.low - 1e-12 <= sum(values) / len(values) <= found.high + 1e-12
    assert 0 <= found.low <= found.high <= 1


def test_mcnemar_counts_disagreements_alone():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 15) == pytest.approx(0.0413895)  # 2 P(X <= 5), X of 20 fair draws
    assert mcnemar(15, 5) == mcnemar(5, 15)
    with pytest.raises(DataError, match="counts of -1 and 3"):
        mcnemar(-1, 3)


@given(differences=st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_sign_flips_are_those_of_enumeration(differences):
    given_ = [abs(d) for d in differences]
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, given_, strict=True)))
        for signs in product((-1, 1), repeat=len(given_))
    ]
    expected = sum(each >= observed for each in sums) / len(sums)
    assert sign_flip(differences) == pytest.approx(expected)


def test_drawn_sign_flips_approach_the_exact_ones():
    # Of n equal differences the sign-flip test is the binomial test of McNemar.
    first, second = solved(0, 14, 30, 0)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    assert sign_flip(differences) == pytest.approx(mcnemar(14, 30), abs=0.005)
    assert sign_flip([1.0] * 40) == 1 / 10_001
    assert sign_flip([0.0] * 40) == 1
    assert sign_flip([0.1, 0.2, -0.3]) == 1  # a sum of 0 up to rounding


def test_sign_flips_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(2).normal(0.4, 1, size=12)
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip(differences.tolist()) == pytest.approx(expected)


def test_a_paired_comparison_of_zeros_and_ones():
    found = compare_paired(*solved(40, 10, 25, 25))
    assert (found.first, found.second, found.n) == (0.5, 0.65, 100)
    assert found.difference == pytest.approx(0.15)
    assert found.test == "McNemar, exact"
    assert found.p_value == pytest.approx(mcnemar(10, 25))
    # Bonett and Price (2012) by hand: p = 26/102, q = 11/102, z = 1.959964.
    assert found.interval.low == pytest.approx(0.0340, abs=5e-4)
    assert found.interval.high == pytest.approx(0.2602, abs=5e-4)


def test_a_paired_comparison_of_graded_rewards():
    first = [0.1 * (i % 7) for i in range(60)]
    second = [reward + 0.05 + 0.01 * (i % 3) for i, reward in enumerate(first)]
    found = compare_paired(first, second)
    assert found.test == "sign flips"
    assert found.p_value < 0.001
    assert found.interval.low < found.difference < found.interval.high
    assert found.interval.low > 0.05


@given(first=rewards, data=st.data())
def test_exchanging_the_systems_exchanges_the_result(first, data):
    second = data.draw(
        st.lists(st.sampled_from([0.0, 1.0]), min_size=len(first), max_size=len(first))
    )
    one, other = compare_paired(first, second), compare_paired(second, first)
    assert one.difference == pytest.approx(-other.difference)
    assert one.p_value == pytest.approx(other.p_value)
    assert 0 < one.p_value <= 1
    assert one.interval.low == pytest.approx(-other.interval.high, abs=0.05)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1.0], [1.0, 0.0], "1 values are compared with 2"),
        ([], [], "no values"),
        ([1.0, math.nan], [0.0, 0.0], "value 1 is nan"),
    ],
)
def test_what_are_no_pairs_is_refused(first, second, said):
    with pytest.raises(DataError, match=said):
        compare_paired(first, second)


def test_seeds_are_compared_by_the_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    first, second = [0.31, 0.28, 0.35, 0.30], [0.36, 0.35, 0.37, 0.41]
    found = compare_seeds(first, second)
    expected = stats.ttest_rel(second, first)
    assert found.p_value == pytest.approx(expected.pvalue)
    bounds = expected.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((bounds.low, bounds.high))
    # By hand: differences .05 .07 .02 .11, mean .0625, deviation .0377, t = 3.313, 3.182 at .95.
    assert found.difference == pytest.approx(0.0625)
    assert found.interval.low == pytest.approx(0.0625 - 3.1824 * 0.037749 / 2, abs=1e-5)


def test_seeds_without_spread_tell_nothing():
    found = judge({"a": ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])}, over_seeds=True)["a"]
    assert found.verdict is Verdict.CANNOT_BE_TOLD
    assert "without spread" in found.reason
    with pytest.raises(DataError, match="1 pair of seeds"):
        compare_seeds([0.1], [0.2])


def test_holm_is_that_of_the_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []
    with pytest.raises(DataError, match="a p-value is nan"):
        holm([math.nan])


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_corrects_upwards_and_keeps_the_order(values):
    adjusted = holm(values)
    assert all(value <= each <= 1 for value, each in zip(values, adjusted, strict=True))
    assert all(
        each <= min(1, len(values) * value) + 1e-12
        for value, each in zip(values, adjusted, strict=True)
    )
    pairs = sorted(zip(values, adjusted, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))


def test_verdicts_tell_no_difference_from_too_few_tasks():
    findings = judge(
        {
            "better": solved(100, 10, 60, 130),
            "worse": solved(100, 60, 10, 130),
            "alike": solved(1000, 20, 20, 1000),
            "too few": solved(2, 2, 4, 2),
        },
        smallest_effect=0.05,
    )
    assert [each.verdict for each in findings.values()] == [
        Verdict.HOLDS,
        Verdict.DOES_NOT_HOLD,
        Verdict.DOES_NOT_HOLD,
        Verdict.CANNOT_BE_TOLD,
    ]
    assert "an improvement of 0.05 is excluded" in findings["alike"].reason
    assert "n = 10" in findings["too few"].reason
    assert findings["better"].comparison.interval.level == 1 - 0.05 / 4
    assert findings["better"].adjusted_p == pytest.approx(4 * mcnemar(10, 60))


def test_of_many_comparisons_without_a_difference_few_look_like_one():
    random = np.random.default_rng(0)
    found = 0
    for _ in range(60):
        pairs = {
            str(i): ((random.random(100) < 0.4) * 1.0, (random.random(100) < 0.4) * 1.0)
            for i in range(8)
        }
        verdicts = [each.verdict for each in judge(pairs).values()]
        found += Verdict.HOLDS in verdicts
    assert found <= 4  # 0.05 / 2 of 60 families, one-sided, and Holm is cautious


def test_a_family_needs_settings_that_mean_something():
    assert judge({}) == {}
    pairs = {"a": ([0.0], [1.0])}
    with pytest.raises(ConfigError, match="alpha is 1"):
        judge(pairs, alpha=1)
    with pytest.raises(ConfigError, match="smallest_effect is 0"):
        judge(pairs, smallest_effect=0)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([-1.25], [-1.24], "on one task, which tells nothing of others"),
        ([-1.25, -0.5], [-1.25, -0.5], "for every one of 2 tasks, without spread"),
        ([0.5] * 200, [0.5] * 200, "for every one of 200 tasks, without spread"),
        ([0.1, 0.2, 0.7], [0.2, 0.3, 0.8], "for every one of 3 tasks, without spread"),
        ([-1e9], [-1e9 - 1], "on one task"),
    ],
)
def test_differences_without_spread_exclude_nothing(first, second, said):
    finding = judge({"text": (first, second)}, smallest_effect=0.05)["text"]
    assert finding.verdict is Verdict.CANNOT_BE_TOLD
    assert said in finding.reason
    interval = finding.comparison.interval
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_the_same_gain_on_many_tasks_is_a_gain():
    """Without spread there is no interval; that all signs agree is no chance nevertheless."""
    finding = judge({"text": ([0.25] * 12, [0.5] * 12)})["text"]
    assert finding.verdict is Verdict.HOLDS
