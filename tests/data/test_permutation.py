"""The computed shuffle is a bijection, and looks like a shuffle."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.permutation import permute


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers())
def test_bijection_for_every_size(size, seed):
    shuffled = permute(np.arange(size), size=size, seed=(seed, "x"))
    assert np.array_equal(np.sort(shuffled), np.arange(size))


def test_each_number_alone_gives_what_all_give():
    together = permute(np.arange(100), size=100, seed=(1,))
    assert [permute(np.array([i]), size=100, seed=(1,))[0] for i in range(100)] == list(together)


def test_every_part_of_the_seed_matters():
    seeds = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    orders = {tuple(permute(np.arange(50), size=50, seed=seed)) for seed in seeds}
    assert len(orders) == len(seeds)


def test_the_order_is_fixed_for_all_time():
    # Resuming an old run needs today's order: this list changes only with a new seed meaning.
    assert permute(np.arange(10), size=10, seed=(0, "text", 0)).tolist() == [
        1,
        9,
        2,
        3,
        0,
        8,
        6,
        7,
        5,
        4,
    ]


def test_places_are_spread_evenly():
    size, seeds = 101, 2000
    first = np.array([permute(np.array([7]), size=size, seed=(s,))[0] for s in range(seeds)])
    counts = np.bincount(first, minlength=size)
    chi2 = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
    assert chi2 < 150  # 100 expected, 14 standard deviation


def test_neighbours_do_not_stay_neighbours():
    shuffled = permute(np.arange(10_000), size=10_000, seed=(3,))
    assert (np.abs(np.diff(shuffled)) < 100).mean() < 0.04  # 0.02 expected


def test_large_sizes():
    size = 10**15 + 1
    shuffled = permute(np.arange(1000), size=size, seed=(0,))
    assert len(set(shuffled.tolist())) == 1000
    assert shuffled.max() > size / 2
