"""MS-EDEN: right on the average over rotations, at half the error of stochastic rounding."""

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.ops.nvfp4 import fake_ms_eden, hadamard, ms_eden, quantize, random_signs
from nemotron3.ops.rounding import Noise
from tests.ops.native import needs_compiler

CPU = torch.device("cpu")
ROTATION = Noise(seed=0, step=1, layer=1, role="rotation")  # that of signs_of(1, ...)


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


def test_matrices_that_share_their_draws_have_uncorrelated_errors():
    """Experts share signs and noise (docs/decisions/0020); the errors of their sum add up as if
    they did not."""
    matrices, products, squares = torch.randn(2, 32, 128), 0.0, 0.0
    for step in range(50):
        rotation, noise = noise_of(step, "rotation"), noise_of(step)
        turned = hadamard(matrices, signs_of(step, 128))
        one, other = fake_ms_eden(matrices, "rows", rotation, noise) - turned
        products += (one * other).sum().item()
        squares += (squared(one) + squared(other)) / 2
    assert abs(products / squares) < 0.01


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


def assert_same_bits(x, kind, size, **options):
    """The compiled values are those of the definition, and those that `ms_eden` packs."""
    signs, noise = signs_of(1, size), options.pop("noise", noise_of(1))
    one, other = (
        fake_ms_eden(x, kind, ROTATION, noise, backend=backend, **options)
        for backend in ("reference", "native")
    )
    assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    assert other.dtype == torch.float32
    if x.dim() == 2:
        turned = x.T if kind == "columns" else x
        packed = ms_eden(turned, signs, noise, **options).dequantize()
        packed = packed.T if kind == "columns" else packed
        assert torch.equal(packed.nan_to_num(7.0), other.nan_to_num(7.0))


@needs_compiler
@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
def test_the_compiled_bits_are_those_of_the_definition(kind, size, dtype, spread):
    for groups, others in ((1, 16), (3, 48), (5, 80), (7, 272)):
        x = torch.randn(others, groups * size) * torch.exp(spread * torch.randn(others, 1))
        x[0], x[1, : size // 2] = 0.0, 0.0
        assert_same_bits((x.T if kind == "columns" else x).to(dtype), kind, size)
    if kind == "rows":
        for rows in (1, 7):
            assert_same_bits(torch.randn(rows, 3 * size).to(dtype), kind, size)


@needs_compiler
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_the_compiled_bits_of_what_is_small_large_or_not_finite(kind):
    x = torch.randn(64, 64)
    for size in (1e-44, 1e-40, 1e-37, 1e-35, 1e30, 1e37, 2.9e38):
        assert_same_bits(x * size, kind, 64)
    x[3, 40], x[2, 3], x[40, 60] = torch.nan, torch.inf, -torch.inf
    x[5] = 3.3e38  # sums that overflow
    assert_same_bits(x, kind, 64)
    assert_same_bits(torch.zeros(64, 64), kind, 64)
    assert_same_bits(torch.full((64, 64), torch.nan), kind, 64)


@needs_compiler
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_the_compiled_bits_of_parts_batches_and_given_magnitudes(kind):
    x = torch.randn(3, 96, 96) * torch.tensor([1.0, 100.0, 0.0]).view(3, 1, 1)
    places = torch.randperm(1 << 20)[: x.shape[1 if kind == "rows" else 2]]
    noise = Noise(0, 1, 1, "gradient", places, 2064)  # blocks from 129 on
    assert_same_bits(x, kind, 32, noise=noise)
    whole = fake_ms_eden(x, kind, ROTATION, noise)
    for matrix, found in zip(x, whole, strict=True):
        assert torch.equal(fake_ms_eden(matrix, kind, ROTATION, noise), found)
    for size in (1e-3, 4.0, 1e30):
        assert_same_bits(x[0], kind, 32, amax=torch.tensor(size))
    assert fake_ms_eden(x[:0], kind, ROTATION, noise).shape == (0, 96, 96)
    many = torch.randn(16, 2304) if kind == "rows" else torch.randn(2304, 16)  # of 144 blocks
    assert_same_bits(many, kind, 128)


@needs_compiler
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_threads_change_no_bit(kind):
    x, threads = torch.randn(640, 256), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fake_ms_eden(x, kind, ROTATION, noise_of(1), backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_mistakes_are_named():
    with pytest.raises(OperandError, match=r"signs has shape \[24\]; expected \[16\]"):
        ms_eden(torch.randn(2, 48), torch.ones(24), noise_of(0))
    with pytest.raises(OperandError, match="48 d of x are not divisible by 32"):
        ms_eden(torch.randn(2, 48), torch.ones(32), noise_of(0))
    with pytest.raises(OperandError, match=r"amax has shape \[1\]; expected \[\]"):
        ms_eden(torch.randn(2, 64), torch.ones(32), noise_of(0), amax=torch.ones(1))
    with pytest.raises(ValueError, match="kind is 'tiles'; choose from rows, columns"):
        fake_ms_eden(torch.randn(32, 32), "tiles", ROTATION, noise_of(0))
    with pytest.raises(OperandError, match="24 d of x are not divisible by 16"):
        fake_ms_eden(torch.randn(32, 24), "columns", ROTATION, noise_of(0))
    with pytest.raises(OperandError, match="24 rows of x are not divisible by 16"):
        fake_ms_eden(torch.randn(24, 32), "columns", ROTATION, noise_of(0))
    with pytest.raises(OperandError, match="1 batch axes before"):
        fake_ms_eden(torch.randn(32), "rows", ROTATION, noise_of(0))
