"""The kernel of MXFP8 against the reference, in Triton's interpreter: the same bits."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.ops import mxfp8
from nemotron3.ops.rounding import Noise
from tests.ops.test_fp8 import ELEMENTS, awkward

# NumPy, which interprets the kernels, warns where numbers underflow.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("noise", [None, Noise(1, 2, 3, "x", torch.arange(64) * 3, 112)])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_the_kernel_has_the_bits_of_the_reference(kind, element, noise):
    rounding = "nearest" if noise is None else "stochastic"
    for size in (1.0, 1e-41, 1e37):
        x = awkward(size)[1, :, :96]
        one, other = (
            mxfp8.fake_quantize(x, kind, element, rounding, noise=noise, backend=backend)
            for backend in ("reference", "triton")
        )
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    assert mxfp8.fake_quantize(torch.randn(0, 32), backend="triton").shape == (0, 32)
