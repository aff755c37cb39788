"""The rounding kernels against the written-out rounding, in Triton's interpreter: the same bits."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.ops.rounding import RandomBits, to_float16, to_int8


@pytest.mark.parametrize("bits", [RandomBits(0, 0, 5), RandomBits(2**32 - 1, 90, 10)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 16), (2, 7, 33), (2, 9, 128), (1, 4, 192), (2, 1, 1100)]
)
def test_kernels_have_the_bits_of_the_reference(shape, bits):
    x = torch.randn(shape) * torch.exp2(torch.randint(-30, 20, shape))
    x[0, 0, 0] = torch.nan
    positions = torch.arange(shape[0]) * 100_003
    one, other = (to_float16(x, positions, bits, backend=b) for b in ("reference", "triton"))
    assert torch.equal(one.view(torch.int16), other.view(torch.int16))
    for one, other in zip(
        *(to_int8(x, positions, bits, backend=b) for b in ("reference", "triton")), strict=True
    ):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
