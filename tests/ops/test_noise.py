"""Noise that is a function of where it is used: its values, its shape, its independence."""

import math

import torch

from nemotron3.ops.sampling.noise import ROUNDING, gumbel, gumbel_bound, position_key


def test_keys_differ_wherever_anything_differs():
    keys = [position_key(s, i, p) for s in range(20) for i in range(20) for p in range(20)]
    assert len(set(keys)) == 8000
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert position_key(2**63 - 1, 127, 10**6) != position_key(2**63 - 2, 127, 10**6)


def split_mix(word):
    """The published function, in whole numbers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_the_noise_is_split_mixs_and_never_changes():
    """A seed that someone wrote down means the same tokens in the next version."""
    assert split_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of seed 0
    key = position_key(7, 1, 42)
    assert key == -3598376481928998337
    for token in (0, 1, 131071):
        word = split_mix((key + (token + 1) * 0x9E3779B97F4A7C15) % 2**64)
        uniform = ((word >> 12) + 0.5) / 2**52
        expected = -math.log(-math.log1p(-uniform))
        value = gumbel(torch.tensor([key]), torch.tensor([token])).item()
        assert math.isclose(value, expected, rel_tol=1e-12)


def test_a_token_has_its_noise_in_any_company():
    keys = torch.tensor([position_key(0, 0, p) for p in range(50)])
    tokens = torch.arange(1001)
    together = gumbel(keys[:, None], tokens)
    for p, token in ((0, 0), (17, 3), (49, 1000)):
        assert gumbel(keys[p : p + 1], tokens[token : token + 1]) == together[p, token]
    assert (gumbel(keys[:7, None], tokens[3:]) == together[:7, 3:]).all()


def test_it_is_gumbel_and_independent():
    keys = torch.tensor([position_key(s, 0, p) for s in range(10) for p in range(20)])
    noise = gumbel(keys[:, None], torch.arange(1000))  # 200,000 values
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    steps = torch.arange(1, uniform.numel() + 1) / uniform.numel()
    assert (uniform - steps).abs().max() < 1.95 / math.sqrt(uniform.numel())  # Kolmogorov, 0.1 %
    assert torch.isfinite(noise).all()
    bound = 4 / math.sqrt(noise.numel())
    flat = (noise - noise.mean()) / noise.std()
    assert (flat[:, 1:] * flat[:, :-1]).mean().abs() < bound  # neighbouring tokens
    assert (flat[1:] * flat[:-1]).mean().abs() < bound  # neighbouring positions
    assert (flat[20:] * flat[:-20]).mean().abs() < bound  # neighbouring seeds


def test_the_quick_bound_is_one_and_is_near_where_it_counts():
    keys = torch.tensor([position_key(1, 0, p) for p in range(200)])[:, None]
    tokens = torch.arange(1000)
    noise, bound = gumbel(keys, tokens), gumbel_bound(keys, tokens)
    assert (bound >= noise - ROUNDING).all()
    large = noise > 6
    assert large.sum() > 100
    assert (bound[large] - noise[large]).max() < 0.01
