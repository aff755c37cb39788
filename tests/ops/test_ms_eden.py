"""MS-EDEN: right on the average over rotations, at half the error of stochastic rounding."""

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.ops.nvfp4 import hadamard, ms_eden, quantize, random_signs
from nemotron3.ops.rounding import Noise

CPU = torch.device("cpu")


def noise_of(step, role="gradient"):
    return Noise(seed=0, step=step, layer=1, role=role)


def signs_of(step, size):
    return random_signs(noise_of(step, "rotation"), size, CPU)


def rotated_back(y, signs):
    """The inverse of the transform: its matrix is symmetric but for the signs."""
    return hadamard(y, torch.ones(len(signs))) * signs.repeat(y.shape[-1] // len(signs))


def squared(x):
    return x.double().square().sum().item()


@pytest.mark.parametrize("kind", ["normal", "heavy", "rows"])
def test_the_error_is_half_that_of_stochastic_rounding(kind):
    x = torch.randn(128, 256)
    if kind == "heavy":
        x = x / torch.randn(3, 128, 256).square().mean(0).sqrt()
    if kind == "rows":
        x = x * torch.exp(2 * torch.randn(128, 1))
    signs = signs_of(0, 128)
    y = hadamard(x, signs)
    found = ms_eden(x, signs, noise_of(0)).dequantize()
    drawn = quantize(y, rounding="stochastic", noise=noise_of(0)).dequantize()
    assert 0.3 < squared(found - y) / squared(drawn - y) < 0.55
    assert squared(rotated_back(found, signs) - x) == pytest.approx(squared(found - y), rel=1e-3)


@pytest.mark.parametrize("size", [64, 128])
def test_it_is_right_on_the_average(size):
    """The mean's error falls as that of independent draws, where that of nearest stays."""
    draws, x = 400, torch.randn(16, 128)
    total, single, nearest = torch.zeros_like(x), 0.0, torch.zeros_like(x)
    for step in range(draws):
        signs = signs_of(step, size)
        back = rotated_back(ms_eden(x, signs, noise_of(step)).dequantize(), signs)
        total += back
        single += squared(back - x) / draws
        nearest += rotated_back(quantize(hadamard(x, signs)).dequantize(), signs)
    left = squared(total / draws - x)
    assert left < 1.6 * single / draws
    assert squared(nearest / draws - x) > 1.5 * left
    shrunk = (total / draws * x).sum() / x.square().sum()
    assert shrunk == pytest.approx(1.0, abs=1e-3)


def test_a_product_of_two_rotated_operands():
    x, y = torch.randn(32, 256), torch.randn(48, 256)
    signs = signs_of(3, 128)
    one, other = (ms_eden(t, signs, noise_of(3, role)).dequantize() for role, t in
                  (("left", x), ("right", y)))  # fmt: skip
    assert squared(one @ other.T - x @ y.T) < 0.03 * squared(x @ y.T)


def test_it_repeats_and_a_part_is_as_in_the_whole():
    x, signs = torch.randn(8, 256), signs_of(1, 32)
    whole = ms_eden(x, signs, noise_of(1))
    amax = hadamard(x, signs).abs().max()
    part = Noise(0, 1, 1, "gradient", torch.tensor([5, 2]), 128)
    found = ms_eden(x[[5, 2], 128:], signs, part, amax=amax)
    assert torch.equal(found.dequantize(), whole.dequantize()[[5, 2], 128:])
    other = ms_eden(x, signs, noise_of(2)).block_scales.view(torch.uint8)
    assert (other != whole.block_scales.view(torch.uint8)).float().mean() > 0.2
    assert signs.abs().eq(1).all()
    assert not torch.equal(signs, signs_of(2, 32))


def test_zeros_small_and_large_numbers_and_what_is_not_finite():
    signs = signs_of(0, 32)
    assert not ms_eden(torch.zeros(2, 64), signs, noise_of(0)).dequantize().any()
    x = torch.randn(4, 64)
    for size in (1e-30, 1e-35, 1e30, 1e37):
        back = ms_eden(x * size, signs, noise_of(0)).dequantize()
        assert squared(back / size - hadamard(x, signs)) < 0.03 * squared(x)
    x[1, 40] = torch.nan
    x[2, 3] = torch.inf
    back = ms_eden(x, signs, noise_of(0)).dequantize()
    assert back[1, 32:].isnan().all()
    assert back[2, :32].isnan().all()
    assert back[[0, 3]].isfinite().all()
    assert back[1, :32].isfinite().all()
    assert ms_eden(torch.randn(4, 64).bfloat16(), signs, noise_of(0)).shape == (4, 64)
    assert ms_eden(torch.randn(0, 64), signs, noise_of(0)).shape == (0, 64)


def test_mistakes_are_named():
    with pytest.raises(OperandError, match=r"signs has shape \[24\]; expected \[16\]"):
        ms_eden(torch.randn(2, 48), torch.ones(24), noise_of(0))
    with pytest.raises(OperandError, match="48 d of x are not divisible by 32"):
        ms_eden(torch.randn(2, 48), torch.ones(32), noise_of(0))
    with pytest.raises(OperandError, match=r"amax has shape \[1\]; expected \[\]"):
        ms_eden(torch.randn(2, 64), torch.ones(32), noise_of(0), amax=torch.ones(1))
