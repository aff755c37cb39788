"""FP8 and MXFP8: every input has the result that is written down."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import OperandError
from nemotron3.ops import fp8, mxfp8, native
from nemotron3.ops.rounding import Noise

BACKENDS = ["reference", "torch"]
ELEMENTS = {"e4m3": (448.0, 2.0**-4, 2.0**-10), "e5m2": (57344.0, 2.0**-3, 2.0**-17)}
"""The largest element, the largest relative error, and half the smallest element."""
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_element = pytest.mark.parametrize("element", ELEMENTS)
NOISE = Noise(1, 2, 3, "gradient")
LARGEST = torch.finfo(torch.float32).max
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
numbers = st.lists(st.one_of(finite, st.floats(-8, 8, width=32)), min_size=64, max_size=64)


def power_of(amax, element):
    """The least power of two, 2^-127 at least, that brings `amax` within the elements' range."""
    exponent = -127
    while math.ldexp(ELEMENTS[element][0], exponent) * (1 + 2.0**-24) < amax:
        exponent += 1
    return exponent


@every_backend
@given(numbers, st.sampled_from(sorted(ELEMENTS)), st.booleans())
def test_any_finite_numbers_in_fp8(backend, drawn, element, is_bfloat16):
    largest, relative, least = ELEMENTS[element]
    x = torch.tensor(drawn, dtype=torch.float32)
    x = x.clamp(-3e38, 3e38).bfloat16() if is_bfloat16 else x
    found = fp8.quantize(x, element, backend=backend)
    wanted = max(x.double().abs().max().item() / largest, 2.0**-126)
    assert found.scale.item() == pytest.approx(wanted, rel=1e-6)
    error = (found.dequantize().double() - x.double()).abs()
    assert (error <= (relative * x.double().abs()).clamp(min=least * wanted) * 1.00001).all()


@every_backend
@given(numbers, st.sampled_from(sorted(ELEMENTS)), st.booleans())
def test_any_finite_numbers_in_mxfp8(backend, drawn, element, is_bfloat16):
    _, relative, least = ELEMENTS[element]
    x = torch.tensor(drawn, dtype=torch.float32).view(2, 32)
    x = x.clamp(-3e38, 3e38).bfloat16() if is_bfloat16 else x
    found = mxfp8.quantize(x, element, backend=backend)
    back = found.dequantize().double()
    for row in range(2):
        exponent = power_of(x[row].double().abs().max().item(), element)
        assert found.block_scales[row].view(torch.uint8).item() == exponent + 127
        allowed = (relative * x[row].double().abs()).clamp(min=math.ldexp(least, exponent))
        assert ((back[row] - x[row].double()).abs() <= allowed * 1.00001 + 1e-45).all()


@every_backend
@every_element
def test_zeros_and_what_is_not_finite(backend, element):
    zeros = torch.zeros(2, 64)
    for quantize in (fp8.quantize, mxfp8.quantize):
        found = quantize(zeros, element, backend=backend)
        assert torch.equal(found.dequantize(), zeros)
    x = torch.randn(2, 64)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[0, 40] = value
        without = spoilt.clone()
        without[0, 40] = 0.0
        expected = fp8.quantize(without, element, backend=backend).dequantize()
        back = fp8.quantize(spoilt, element, backend=backend).dequantize()
        assert back[0, 40].isnan()
        back[0, 40] = 0.0
        assert torch.equal(back, expected)
        expected = mxfp8.quantize(x, element, backend=backend).dequantize()
        back = mxfp8.quantize(spoilt, element, backend=backend).dequantize()
        assert back[0, 32:].isnan().all()
        back[0, 32:] = expected[0, 32:]
        assert torch.equal(back, expected)
        assert fp8.quantize(torch.full((4,), value), backend=backend).dequantize().isnan().all()


@every_backend
@every_element
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-37, 1e-39, LARGEST / 8])
def test_magnitudes_from_subnormal_to_the_largest(backend, element, size):
    x = torch.randn(8, 64).clamp(-7, 7) * size
    for quantize in (fp8.quantize, mxfp8.quantize):
        back = quantize(x, element, backend=backend).dequantize().double()
        error = (back - x.double()).square().sum() / x.double().square().sum()
        assert error < (0.003 if element == "e4m3" else 0.012)


def test_the_largest_number_stays_finite():
    """To nearest it would be 2^128, which float32 does not have."""
    x = torch.full((32,), LARGEST)
    assert (mxfp8.quantize(x).dequantize() == LARGEST).all()
    assert (mxfp8.quantize(-x).dequantize() == -LARGEST).all()
    assert (fp8.quantize(x).dequantize() / LARGEST - 1).abs().max() < 1e-6


def awkward(size):
    x = torch.randn(2, 64, 160) * torch.exp2(torch.randint(-20, 3, (2, 64, 1)).float()) * size
    x[0, 3, :32], x[0, 4, 40] = 0.0, -0.0
    x[1, 5, 7], x[1, 40, 100] = torch.nan, torch.inf
    return x


FAKE_BACKENDS = ["reference", *(["native"] if native.available() else [])]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", FAKE_BACKENDS)
@pytest.mark.parametrize("noise", [None, NOISE, Noise(1, 2, 3, "x", None, 112)])
@every_element
@pytest.mark.parametrize("size", [1.0, 1e-37, 1e-41, 1e37])
def test_fake_quantization_to_mxfp8_gives_the_values(backend, noise, element, size):
    given = {"rounding": "nearest" if noise is None else "stochastic", "noise": noise}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for x in (awkward(size), awkward(size).bfloat16()):
            expected = mxfp8.quantize(x, element, **given, backend="reference").dequantize()
            found = mxfp8.fake_quantize(x, "rows", element, **given, backend=backend)
            assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
            columns = [
                mxfp8.fake_quantize(x, "columns", element, **given, backend=b)
                for b in ("reference", backend)
            ]
            assert torch.equal(columns[0].nan_to_num(7), columns[1].nan_to_num(7))
            if noise is None:
                turned = mxfp8.quantize(x.flatten(0, 1).T, element).dequantize().T
                assert torch.equal(columns[1].nan_to_num(7), turned.view(x.shape).nan_to_num(7))


DRAWS = 4096


@every_element
@pytest.mark.parametrize("quantize", [fp8.quantize, mxfp8.quantize], ids=["fp8", "mxfp8"])
def test_stochastic_rounding_is_right_on_the_average_and_repeats(quantize, element):
    x = torch.randn(1, 96)
    many = x.repeat(DRAWS, 1)
    found = quantize(many, element, "stochastic", noise=NOISE).dequantize().double()
    steps = found.amax(0) - found.amin(0)
    error = found.mean(0) - x[0].double()
    assert (error.abs() <= 5 * 0.5 * steps / math.sqrt(DRAWS) + 1e-6).all()
    assert (steps > 0).float().mean() > 0.9
    assert (error / steps.clamp(min=1e-6)).mean().abs() < 5 * 0.5 / math.sqrt(DRAWS * x.numel())
    again = quantize(many, element, "stochastic", noise=NOISE).dequantize().double()
    assert torch.equal(found, again)
    part = Noise(1, 2, 3, "gradient", torch.tensor([7, 3]), 64)
    some = many[:2, 64:]
    options = {"amax": x.abs().max()} if quantize is fp8.quantize else {}
    back = quantize(some, element, "stochastic", noise=part, **options).dequantize().double()
    assert torch.equal(back, found[[7, 3], 64:])


def test_each_matrix_of_a_batch_has_a_scale():
    x = torch.randn(3, 4, 8) * torch.tensor([1.0, 50.0, 0.0]).view(3, 1, 1)
    found = fp8.quantize(x, batch_dims=1)
    assert found.scale.shape == (3,)
    alone = torch.stack([fp8.quantize(matrix).dequantize() for matrix in x])
    assert torch.equal(found.dequantize(), alone)
    clipped = fp8.quantize(x, amax=torch.tensor(2.0)).dequantize()
    assert clipped.abs().max() == 2.0


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 64)])
def test_awkward_shapes_and_bytes(shape):
    x = torch.randn(shape)
    one, other = fp8.quantize(x), mxfp8.quantize(x)
    assert one.shape == other.shape == one.dequantize().shape == other.dequantize().shape == shape
    assert one.nbytes == x.numel() + 4
    assert other.nbytes == x.numel() * 33 / 32
    assert one.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert fp8.quantize(torch.randn(3, 5)).shape == (3, 5)


def test_mistakes_are_named():
    with pytest.raises(OperandError, match="mxfp8: 48 d of x are not divisible by 32; pad"):
        mxfp8.quantize(torch.randn(48))
    with pytest.raises(OperandError, match="mxfp8: 48 rows of x are not divisible by 32; pad"):
        mxfp8.fake_quantize(torch.randn(48, 64), "columns")
    with pytest.raises(ValueError, match="kind is 'tiles'; choose from rows, columns"):
        mxfp8.fake_quantize(torch.randn(64, 64), "tiles")
    for quantize in (fp8.quantize, mxfp8.quantize):
        with pytest.raises(ValueError, match="element is 'e3m4'; choose from e4m3, e5m2"):
            quantize(torch.randn(32), "e3m4")
        with pytest.raises(OperandError, match=r"torch.float64; .*x.float\(\)"):
            quantize(torch.randn(32).double())
        with pytest.raises(ValueError, match="pass noise=Noise"):
            quantize(torch.randn(32), rounding="stochastic")
        with pytest.raises(OperandError, match="has no gradients"):
            quantize(torch.randn(32, requires_grad=True))
    with pytest.raises(OperandError, match=r"amax has shape \[2\]; expected \[\]"):
        fp8.quantize(torch.randn(2, 16), amax=torch.ones(2))
