"""Blends: exact proportions at every step, pure functions, phases that carry on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.mixture import Blend, PhaseConfig, PhaseSchedule
from nemotron3.errors import ConfigError

weights_of_several = st.lists(st.integers(1, 400), min_size=1, max_size=7)


def as_blend(weights):
    return Blend({f"source {i}": float(weight) for i, weight in enumerate(weights)})


@settings(max_examples=100, deadline=None)
@given(weights=weights_of_several)
def test_every_source_is_within_one_sample_of_its_share_at_every_step(weights):
    blend = as_blend(weights)
    num = min(3000, 2 * int(blend.shares.sum()) + 5)
    source, index = blend.source_and_index(np.arange(num))
    share = blend.shares / blend.shares.sum()
    taken = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    target = np.arange(1, num + 1)[:, None] * share
    assert np.abs(taken - target).max() < 1
    assert np.array_equal(index, taken[np.arange(num), source] - 1)
    assert np.array_equal(blend.counts(num), taken[-1])
    assert blend.counts(0).sum() == 0


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1e9), min_size=1, max_size=7))
def test_shares_are_the_weights(weights):
    shares = as_blend(weights).shares
    exact = np.array(weights) / sum(weights)
    assert np.abs(shares / shares.sum() - exact).max() <= 1e-5 * len(weights)
    assert shares.min() >= 1


def test_long_periods_keep_the_bound():
    blend = as_blend([0.123456789, 0.5, 0.3333333, 1.7])
    source, _ = blend.source_and_index(np.arange(150_000))
    taken = np.cumsum(source[:, None] == np.arange(4), axis=0)
    target = np.arange(1, 150_001)[:, None] * (blend.shares / blend.shares.sum())
    assert np.abs(taken - target).max() < 1


def test_decimal_weights_are_exact_and_short():
    assert Blend({"a": 0.7, "b": 0.3}).shares.tolist() == [7, 3]
    assert Blend({"a": 5.0, "b": 5.0}).shares.tolist() == [1, 1]
    assert Blend({"a": 1.0, "b": 2.0}).shares.tolist() == [1, 2]
    assert Blend({"a": 1e-9, "b": 1.0}).shares.tolist() == [1, 99_999]


def test_far_samples_come_at_once_and_agree_with_the_period():
    blend = Blend({"a": 0.5, "b": 0.3, "c": 0.2})
    far = np.arange(10) + 10**15
    source, index = blend.source_and_index(far)
    assert np.array_equal(source, blend.source_and_index(np.arange(10))[0])
    assert index[0] == blend.counts(10**15)[source[0]]


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("inf")}])
def test_weights_that_cannot_be(weights):
    with pytest.raises(ConfigError):
        Blend(weights)


PHASES = [
    (Blend({"web": 0.8, "code": 0.2}), 0.5),
    (Blend({"maths": 1.0}), 0.6),
    (Blend({"web": 0.3, "code": 0.3, "maths": 0.4}), 1.0),
]
NAMES = ("web", "code", "maths")


def test_every_source_goes_on_where_it_was_through_the_phases():
    schedule = PhaseSchedule(PHASES, total_samples=1000, names=NAMES)
    source, index = schedule.source_and_index(np.arange(1200))
    for number, name in enumerate(NAMES):
        places = index[source == number]
        assert places.tolist() == list(range(len(places)))  # none twice, none left out
        for samples in (0, 1, 499, 500, 555, 600, 999, 1000, 1200):
            assert schedule.consumed(samples)[name] == (source[:samples] == number).sum()
    assert set(source[500:600]) == {2}


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 1100), count=st.integers(1, 100))
def test_any_stretch_is_what_the_whole_gives(first, count):
    schedule = PhaseSchedule(PHASES, total_samples=1000, names=NAMES)
    whole = schedule.source_and_index(np.arange(1200))
    part = schedule.source_and_index(np.arange(first, first + count))
    for a, b in zip(whole, part, strict=True):
        assert np.array_equal(a[first : first + count], b)


def test_schedule_from_configs_takes_sources_by_size_where_no_weights_are():
    schedule = PhaseSchedule.build(
        [PhaseConfig(until=0.5), PhaseConfig(weights={"b": 1.0})],
        total_samples=100,
        num_tokens={"a": 3000, "b": 1000},
    )
    assert schedule.consumed(40) == {"a": 30, "b": 10}
    assert schedule.consumed(100) == {"a": 38, "b": 62}


@pytest.mark.parametrize(
    ("ends", "names", "total"),
    [
        ([0.5, 0.5, 1.0], NAMES, 10),
        ([0.5, 0.4, 1.0], NAMES, 10),
        ([0.2, 0.4, 0.9], NAMES, 10),
        ([0.2, 0.4, 1.0], ("web", "code"), 10),
        ([0.2, 0.4, 1.0], NAMES, 0),
    ],
)
def test_schedules_that_cannot_be(ends, names, total):
    phases = [(blend, end) for (blend, _), end in zip(PHASES, ends, strict=True)]
    with pytest.raises(ConfigError):
        PhaseSchedule(phases, total_samples=total, names=names)


def test_phase_config_checks():
    with pytest.raises(ConfigError, match=r"until = 1\.5"):
        PhaseConfig(until=1.5)
    with pytest.raises(ConfigError, match="weight of a"):
        PhaseConfig(weights={"a": 0.0})
