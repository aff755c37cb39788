"""Random numbers by place: any part is a part of the whole, and the shape is right."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.ops.counter_random import normal, stream_key, uniform

CPU = torch.device("cpu")
KEY = stream_key(0, "a name")


@pytest.mark.parametrize("draw", [uniform, normal])
@given(start=st.integers(0, 500), count=st.integers(0, 300))
def test_a_part_is_a_part_of_the_whole(draw, start, count):
    whole = draw(KEY, 0, 800, CPU)
    part = draw(KEY, start, start + count, CPU)
    assert part.dtype == torch.float32
    assert torch.equal(part, whole[start : start + count])


def test_places_far_away_have_numbers_too():
    far = 2**40 + 1
    assert torch.equal(uniform(KEY, far, far + 5, CPU), uniform(KEY, far - 3, far + 5, CPU)[3:])


def test_keys_differ_wherever_anything_differs():
    keys = {stream_key(seed, name) for seed in (-1, 0, 1, 10, 2**70) for name in ("a", "0 a", "")}
    assert len(keys) == 15
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("name", ["a", "b"])
def test_uniform_numbers_are_uniform_and_independent(name):
    count = 1 << 18
    drawn = uniform(stream_key(3, name), 0, count, CPU).double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, 64, 0, 1)
    chi_square = ((counts - count / 64) ** 2 / (count / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    for lag in (1, 2, 3, 64):
        left, right = drawn[:-lag] - 0.5, drawn[lag:] - 0.5
        assert abs((left * right).mean() * 12) < 5 / math.sqrt(count)


def test_normal_numbers_have_the_moments_and_tails_of_the_normal_distribution():
    count = 1 << 20
    drawn = normal(KEY, 0, count, CPU).double()
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs((drawn**power).mean() - expected)
        assert error < 5 * math.sqrt(spread / count), power
    for limit in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(limit / math.sqrt(2))
        seen = (drawn.abs() > limit).double().mean()
        assert abs(seen - share) < 5 * math.sqrt(share / count), limit
    assert 4.5 < drawn.abs().max() < 6
    pairs = drawn.view(-1, 2)
    for values in (pairs, pairs.square() - 1):
        assert abs((values[:, 0] * values[:, 1]).mean()) < 10 / math.sqrt(count / 2)
    other = normal(stream_key(0, "another name"), 0, count, CPU)
    assert abs((drawn * other).mean()) < 5 / math.sqrt(count)


KEY_OF_SEVEN = -2058240386996459208
UNIFORM = [0.5838228, 0.0105454, 0.3524163, 0.3648545]
NORMAL = [1.0351797, 0.0686904, -0.9541145, 1.0842273]


def test_the_numbers_never_change():
    """A seed that someone wrote down means the same weights in the next version."""
    key = stream_key(7, "backbone.embeddings.weight")
    assert key == KEY_OF_SEVEN
    assert torch.allclose(uniform(key, 0, 4, CPU), torch.tensor(UNIFORM), rtol=0, atol=1e-7)
    assert torch.allclose(normal(key, 0, 4, CPU), torch.tensor(NORMAL), rtol=0, atol=1e-6)
