"""Power against simulation, and what holds for any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import ConfigError
from nemotron3.evaluation.power import mcnemar_power, smallest_detectable
from nemotron3.evaluation.statistics import mcnemar


@pytest.mark.parametrize(
    ("n", "base", "difference", "discordance"), [(120, 0.4, 0.15, None), (200, 0.3, 0.1, 0.2)]
)
def test_power_is_how_often_the_test_finds_it(n, base, difference, discordance):
    power = mcnemar_power(n, base_rate=base, difference=difference, discordance=discordance)
    improved = base + difference
    share = discordance or base * (1 - improved) + (1 - base) * improved
    wins, losses = (share + difference) / 2, (share - difference) / 2
    drawn = np.random.default_rng(0).multinomial(n, [wins, losses, 1 - wins - losses], size=2000)
    found = np.mean([win > loss and mcnemar(int(loss), int(win)) <= 0.05 for win, loss, _ in drawn])
    assert power == pytest.approx(found, abs=4 * np.sqrt(0.25 / 2000))


def test_power_by_hand():
    # With 6 tasks that all disagree the test needs 6 wins of 6: p = 2/64.
    found = mcnemar_power(6, base_rate=0.2, difference=0.6, discordance=1.0)
    assert found == pytest.approx(0.8**6)
    assert mcnemar_power(5, base_rate=0.0, difference=1.0) == 0  # 2/32 is above .05


def test_the_smallest_difference_has_the_power_that_is_wanted():
    found = smallest_detectable(300, base_rate=0.4)
    assert found == pytest.approx(0.1173, abs=2e-4)
    assert mcnemar_power(300, base_rate=0.4, difference=found) >= 0.8
    assert mcnemar_power(300, base_rate=0.4, difference=found - 0.01) < 0.8


def test_more_comparisons_need_more_tasks_and_agreement_fewer():
    alone = smallest_detectable(500, base_rate=0.4)
    among = smallest_detectable(500, base_rate=0.4, num_comparisons=8)
    agreeing = smallest_detectable(500, base_rate=0.4, discordance=0.2)
    assert agreeing < alone < among


def test_some_differences_cannot_be_seen():
    assert smallest_detectable(4, base_rate=0.5) is None
    assert smallest_detectable(100, base_rate=0.95) is None
    assert smallest_detectable(100, base_rate=0.4, discordance=0.02) is None


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 80), base=st.floats(0, 0.9), share=st.floats(0.05, 1))
def test_power_is_a_probability_and_grows_with_the_difference(n, base, share):
    difference = share * (1 - base)
    power = mcnemar_power(n, base_rate=base, difference=difference)
    assert 0 <= power <= 1
    assert power <= mcnemar_power(n, base_rate=base, difference=1 - base) + 1e-9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"difference": 0.7}, "difference is 0.7; above a base rate of 0.4"),
        ({"difference": 0.0}, "difference is 0.0"),
        ({"discordance": 0.05}, "discordance is 0.05; with a base rate of 0.4"),
        ({"discordance": 0.95}, "it lies in"),
        ({"base_rate": 1.0}, "base_rate is 1.0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"n": 0}, "0 tasks and 1 comparisons"),
    ],
)
def test_rates_that_cannot_be_are_refused(changes, said):
    given_ = {"n": 100, "base_rate": 0.4, "difference": 0.1} | changes
    with pytest.raises(ConfigError, match=said):
        mcnemar_power(given_.pop("n"), **given_)
