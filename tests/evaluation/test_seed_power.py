"""The power of comparisons over seeds, against published values and simulated seeds."""

import numpy as np
import pytest

from nemotron3.errors import ConfigError
from nemotron3.evaluation.seed_power import paired_t_power, smallest_detectable_over_seeds
from nemotron3.evaluation.statistics import compare_seeds


@pytest.mark.parametrize(("n", "effect", "power"), [(10, 1.0, 0.8031), (34, 0.5, 0.8078)])
def test_power_is_that_of_published_tables(n, effect, power):
    assert paired_t_power(n, effect) == pytest.approx(power, abs=2e-4)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_no_effect_is_found_as_often_as_alpha_says(n):
    assert paired_t_power(n, 0.0) == pytest.approx(0.05, abs=1e-4)
    assert paired_t_power(n, 0.0, num_comparisons=5) == pytest.approx(0.01, abs=1e-4)


def test_power_is_how_often_the_test_finds_the_effect():
    chance = np.random.default_rng(0)
    found = [
        compare_seeds([0.0] * 3, chance.normal(2.5, 1.0, size=3).tolist()).p_value <= 0.05
        for _ in range(2000)
    ]
    assert np.mean(found) == pytest.approx(paired_t_power(3, 2.5), abs=0.035)


def test_the_smallest_effect_is_found_with_the_power_asked_for():
    for n, comparisons in ((2, 1), (3, 2), (5, 6)):
        effect = smallest_detectable_over_seeds(n, num_comparisons=comparisons)
        assert paired_t_power(n, effect, num_comparisons=comparisons) == pytest.approx(
            0.8, abs=2e-3
        )
        half = smallest_detectable_over_seeds(n, deviation=0.5, num_comparisons=comparisons)
        assert half == pytest.approx(effect / 2)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="num_seeds is 1"):
        paired_t_power(1, 1.0)
    with pytest.raises(ConfigError, match="power is 1"):
        smallest_detectable_over_seeds(3, power=1)
    with pytest.raises(ConfigError, match="alpha is 0"):
        paired_t_power(3, 1.0, alpha=0)
