"""Stochastic rounding: published random bits, right on the average, and alike on every backend."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.ops import native
from nemotron3.ops.rounding import BLOCK, RandomBits, from_int8, to_float16, to_int8
from nemotron3.ops.rounding.bits import philox, sixteen_bits

BITS = RandomBits(seed=5, stream=7, rounds=5)
BACKENDS = ["reference", *(["native"] if native.available() else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
AT = torch.tensor([9])


def at(rows, start=0):
    return torch.arange(start, start + rows)


def hexadecimal(words):
    return [f"{word.item():08x}" for word in words]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """Known answers of Random123 for philox4x32 with ten rounds."""
    words = philox([torch.tensor([word]) for word in counter], key, 10)
    assert hexadecimal(words) == expected.split()


def test_each_element_and_each_position_has_bits_of_its_own():
    bits = sixteen_bits(1000, at(5), BITS)
    assert bits.min() >= 0
    assert bits.max() < 1 << 16
    shares = torch.bincount(bits.flatten() >> 12, minlength=16) / bits.numel()
    assert (shares - 1 / 16).abs().max() < 0.02
    assert len(bits.flatten().unique()) > 0.99 * 65536 * (1 - math.exp(-bits.numel() / 65536))
    assert torch.equal(sixteen_bits(300, at(2, 3), BITS), bits[3:5, :300])
    for other in (RandomBits(6, 7, 5), RandomBits(5, 8, 5), RandomBits(5, 7, 4)):
        assert (sixteen_bits(1000, at(5), other) == bits).float().mean() < 0.001


@pytest.mark.parametrize("rounds", [5, 7, 10])
def test_neighbours_in_the_sequence_and_in_the_state_are_strangers(rounds):
    """Errors that add up over a sequence must not be correlated along it."""
    bits = sixteen_bits(4096, at(128, 1000), RandomBits(0, 3, rounds)).double()
    noise = (bits - bits.mean()) / bits.std()
    for lag in (1, 2, 3):
        assert (noise[lag:] * noise[:-lag]).mean().abs() < 0.01
    for lag in (1, 16, 32, 128):
        assert (noise[:, lag:] * noise[:, :-lag]).mean().abs() < 0.01
    assert noise.mean(0).abs().max() < 5.5 / 128**0.5


def test_where_the_bits_of_a_block_come_from():
    """Element 16 h + i of a block has half h of the words of counter i."""
    bits = sixteen_bits(2 * BLOCK, torch.tensor([40]), BITS)[0]
    zero = torch.zeros(1, dtype=torch.int64)
    words = philox([zero + 16 + 3, zero, zero + 40, zero], (5, 7), 5)
    assert bits[BLOCK + 16 * 4 + 3] == words[2] & 0xFFFF
    assert bits[BLOCK + 16 * 7 + 3] == words[3] >> 16


@every_backend
def test_what_float16_holds_stays_and_the_rest_goes_to_a_neighbour(backend):
    every = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    every = torch.cat([every, -every]).unsqueeze(0)
    assert torch.equal(to_float16(every.float(), AT, BITS, backend=backend), every)
    exact = torch.randn(1, 5000) * torch.exp2(torch.randint(-30, 15, (1, 5000)))
    rounded = to_float16(exact, AT, BITS, backend=backend).float()
    nearest = to_float16(exact, AT, None).float()
    step = torch.exp2(exact.abs().log2().floor().clamp(min=-14) - 10)
    assert ((rounded - exact).abs() < step).all()
    assert ((nearest - exact).abs() <= step / 2).all()
    assert (rounded != nearest).any()


@every_backend
@pytest.mark.parametrize("scale", [1.0, 300.0, 2.0**-16, 2.0**-25])
def test_rounding_is_right_on_the_average(backend, scale):
    """Within four standard deviations of its mean, where the nearest is off by its bias."""
    draws, x = 4096, torch.linspace(0.5, 1.99, 97) * scale
    step = torch.exp2(x.log2().floor().clamp(min=-14) - 10)
    for value in (x, -x):
        many = to_float16(value.expand(draws, -1), at(draws), BITS, backend=backend)
        errors = (many.double() - value.double()) / step
        assert errors.mean(0).abs().max() < 4 * 0.5 / draws**0.5
        assert errors.mean().abs() < 4 * 0.5 / (draws * len(x)) ** 0.5
        nearest = to_float16(value.unsqueeze(0), AT, None)[0].double()
        assert ((nearest - value) / step).abs().max() > 0.4


@every_backend
def test_int8_is_right_on_the_average(backend):
    draws, x = 4096, torch.randn(3, 33)
    codes, steps = to_int8(x.expand(draws, -1, -1), at(draws), BITS, backend=backend)
    assert torch.equal(steps, steps[:1].expand_as(steps))
    assert torch.allclose(steps[0], x.abs().amax(-1, keepdim=True) / 127)
    errors = (from_int8(codes, steps) - x).double() / steps
    assert errors.abs().max() < 1
    assert errors.mean(0).abs().max() < 4 * 0.5 / draws**0.5
    codes, steps = to_int8(x.unsqueeze(0), AT, None)
    assert ((from_int8(codes, steps) - x) / steps).abs().max() <= 0.501


@every_backend
def test_the_edges_of_float16(backend):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor(
        [[0.0, -0.0, 65504.0, 65519.0, -7e4, 3e38, inf, -inf, nan, 1e-30, -(2.0**-24)]]
    )
    y = to_float16(x, AT, BITS, backend=backend)
    assert y[0, :8].tolist() == [0, 0, 65504, 65504, -65504, 65504, 65504, -65504]
    assert y[0, 8].isnan()
    assert y[0, 9:].tolist() == [0, -(2.0**-24)]
    assert y[0, 1].signbit()
    assert to_float16(x, AT, None)[0, :8].tolist() == y[0, :8].tolist()


@every_backend
def test_the_edges_of_int8(backend):
    """A block of zeros, one too small for a step, and one that is not finite."""
    x = torch.zeros(1, 5, 4)
    x[0, 1] = 1e-38
    x[0, 2, 1], x[0, 3, 1] = torch.inf, torch.nan
    x[0, 4] = torch.tensor([127.0, -127.0, 3.0, 0.0])
    for bits in (BITS, None):
        back = from_int8(*to_int8(x, AT, bits, backend=backend))[0]
        assert (back[:2] == 0).all()
        assert not back[2].isfinite().any()
        assert back[3].isnan().all()
        assert torch.equal(back[4], x[0, 4])


@every_backend
def test_a_state_of_several_blocks_has_a_step_for_each(backend):
    x = torch.cat([torch.randn(2, 3, BLOCK), 100 * torch.randn(2, 3, 40)], -1)
    codes, steps = to_int8(x, at(2), BITS, backend=backend)
    assert steps.shape == (2, 3, 2)
    assert torch.allclose(steps[..., 1], x[..., BLOCK:].abs().amax(-1) / 127)
    assert (
        (from_int8(codes, steps) - x).abs()
        < 1.001 * steps.repeat_interleave(BLOCK, -1)[..., : BLOCK + 40]
    ).all()


@pytest.mark.skipif(not native.available(), reason="there is no C++ compiler here")
@given(
    shape=st.sampled_from(
        [(1, 1, 1), (3, 5, 16), (2, 7, 33), (2, 3, 128), (1, 4, 192), (2, 1, 300)]
    ),
    rounds=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 200),
    start=st.integers(0, 1 << 40),
    drawn=st.integers(0, 1000),
)
def test_native_has_the_bits_of_the_reference(shape, rounds, seed, stream, start, drawn):
    generator = torch.Generator().manual_seed(drawn)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2(torch.randint(-30, 20, shape, generator=generator))
    bits, positions = RandomBits(seed, stream, rounds), at(shape[0], start)
    torch.set_num_threads(1 + drawn % 3)
    one, other = (to_float16(x, positions, bits, backend=b) for b in ("reference", "native"))
    assert torch.equal(one.view(torch.int16), other.view(torch.int16))
    for one, other in zip(
        *(to_int8(x, positions, bits, backend=b) for b in ("reference", "native")), strict=True
    ):
        assert torch.equal(one, other)
