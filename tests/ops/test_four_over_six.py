"""Four-over-six: a smaller error than the plain scales, and defined for every input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.nvfp4 import fake_quantize, quantize
from nemotron3.ops.rounding import Noise
from tests.ops.native import needs_compiler


def relative_error(x, **options):
    return ((quantize(x, **options).dequantize() - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("kind", ["normal", "heavy", "rows"])
def test_the_error_is_a_tenth_smaller(kind):
    x = torch.randn(256, 256)
    if kind == "heavy":
        x = x / torch.randn(3, 256, 256).square().mean(0).sqrt()
    if kind == "rows":
        x = x * torch.exp(2 * torch.randn(256, 1))
    plain, better = relative_error(x), relative_error(x, scales="four_over_six")
    assert better < (0.95 if kind == "heavy" else 0.9) * plain
    assert better > 0.7 * plain


def test_a_block_takes_the_range_that_suits_it():
    four = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -3.0] * 2)
    six = torch.tensor([6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0, -4.0] * 2)
    x = torch.stack([four, six * 2 / 3])
    found = quantize(x, scales="four_over_six", amax=torch.tensor(4.0))
    assert torch.equal(found.elements(), torch.stack([four, six]))
    assert torch.allclose(found.dequantize(), x)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=32, max_size=32))
def test_any_finite_numbers(drawn):
    x = torch.tensor(drawn, dtype=torch.float32).view(2, 16)
    back = quantize(x, scales="four_over_six").dequantize()
    assert back.isfinite().all()
    own, whole = x.double().abs().amax(-1, keepdim=True), x.double().abs().max()
    error = (back.double() - x.double()).abs()
    assert (error <= own * 0.18 + whole * 2.0**-10 / 256 + 2e-38).all()


def test_zeros_and_what_is_not_finite():
    assert not quantize(torch.zeros(2, 16), scales="four_over_six").dequantize().any()
    x = torch.randn(3, 32)
    x[1, 3], x[2, 20] = torch.nan, torch.inf
    without = x.nan_to_num(0.0, posinf=0.0)
    back, others = (quantize(t, scales="four_over_six").dequantize() for t in (x, without))
    assert back[1, :16].isnan().all()
    assert back[2, 16:].isnan().all()
    back[1, :16], back[2, 16:] = others[1, :16], others[2, 16:]
    assert torch.equal(back, others)


def awkward(rows, d):
    """Rows of every size, of zeros, of subnormal numbers and of what is not finite."""
    x = torch.randn(rows, d) * torch.exp(20 * torch.randn(rows, 1))
    x.view(-1)[::7] = 0.0
    for row, value in ((1, 0.0), (2, 1e-40), (4, 3e38), (6, -0.0)):
        x[row % rows] = value
    x[3 % rows, d // 2] = torch.nan
    x[5 % rows, 0] = -torch.inf
    return x


def assert_same_bits(x, scales="four_over_six", **options):
    one, other = (
        quantize(x, scales=scales, backend=backend, **options)
        for backend in ("reference", "native")
    )
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.block_scales.view(torch.uint8), other.block_scales.view(torch.uint8))
    assert torch.equal(one.tensor_scale, other.tensor_scale)
    if scales == "mse":  # which has no form that gives values
        return
    values = fake_quantize(x, scales="four_over_six", backend="native", **options)
    assert torch.equal(values.nan_to_num(7.0), one.dequantize().nan_to_num(7.0))
    assert torch.equal(values.signbit(), one.dequantize().signbit() & ~values.isnan())


both_rules = pytest.mark.parametrize("scales", ["four_over_six", "mse"])


@needs_compiler
@both_rules
@pytest.mark.parametrize(("rows", "d"), [(1, 16), (3, 48), (7, 64), (33, 272), (64, 512), (0, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ordinary", "awkward", "small", "large"])
def test_the_compiled_bits_are_those_of_the_definition(rows, d, dtype, kind, scales):
    x = awkward(rows, d) if kind == "awkward" and rows else torch.randn(rows, d)
    x = x * {"small": 1e-37, "large": 1e37}.get(kind, 1.0)
    assert_same_bits(x.to(dtype), scales)


@needs_compiler
@both_rules
@given(drawn=st.lists(finite, min_size=48, max_size=48))
def test_the_compiled_bits_are_those_of_any_finite_numbers(drawn, scales):
    assert_same_bits(torch.tensor(drawn, dtype=torch.float32).view(3, 16), scales)


@needs_compiler
@both_rules
def test_the_compiled_bits_are_those_of_batches_and_of_a_given_magnitude(scales):
    x = torch.randn(3, 5, 80) * torch.tensor([1.0, 100.0, 0.0]).view(3, 1, 1)
    assert_same_bits(x, scales, batch_dims=1)
    for size in (0.5, 3.0, 1e30):
        assert_same_bits(x[0], scales, amax=torch.tensor(size))


@needs_compiler
def test_threads_change_no_bit():
    x, threads = torch.randn(600, 112), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fake_quantize(x, scales="four_over_six", backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_mistakes_are_named():
    x = torch.randn(16, 16)
    with pytest.raises(ValueError, match="scales is 'mean'; choose from max, mse, four_over_six"):
        quantize(x, scales="mean")
    with pytest.raises(ValueError, match=r"block '2d' .* is for block '1d'"):
        quantize(x, "2d", scales="four_over_six")
    with pytest.raises(ValueError, match="rounding 'stochastic'"):
        quantize(x, "1d", "stochastic", noise=Noise(0, 0, 0, "x"), scales="four_over_six")
    with pytest.raises(BackendUnavailableError, match="no backend 'triton'"):
        quantize(x, scales="mse", backend="triton")
    with pytest.raises(ValueError, match="scales of values are 'mse'; choose from max, four"):
        fake_quantize(x, scales="mse")
    with pytest.raises(ValueError, match=r"block 'columns' .* is for block 'rows'"):
        fake_quantize(x, "columns", scales="four_over_six")
