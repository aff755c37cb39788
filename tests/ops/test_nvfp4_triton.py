"""The kernels of NVFP4 against the reference, in Triton's interpreter: the same bits."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.ops.nvfp4 import fake_quantize, quantize
from nemotron3.ops.rounding import Noise
from tests.ops.test_nvfp4 import KINDS, awkward_tensor, rounding_of, same_bits, signs

# Where a kernel divides by zero to get an infinity, NumPy, which interprets it, warns.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
NOISES = [None, Noise(5, 6, 7, "gradient"), Noise(1, 2, 3, "x", None, 1280)]
SHAPES = [(1, 16, 16), (3, 32, 48)]
every_noise = pytest.mark.parametrize("noise", NOISES, ids=["nearest", "stochastic", "a part"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.mark.usefixtures("poisoned_memory")
@every_noise
@every_shape
@pytest.mark.parametrize("kind", [*KINDS, "columns"])
def test_kernels_have_the_bits_of_the_reference(kind, shape, noise):
    for x, batch_dims in (
        (torch.randn(shape), 0),
        (awkward_tensor(shape), 1),
        (torch.randn(shape) * 1e-37, 1),
    ):
        given = {**rounding_of(noise), "batch_dims": batch_dims}
        one, other = (fake_quantize(x, kind, **given, backend=b) for b in ("reference", "triton"))
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        if kind in KINDS:
            same_bits(
                *(quantize(x, KINDS[kind], **given, backend=b) for b in ("reference", "triton"))
            )


@pytest.mark.usefixtures("poisoned_memory")
@every_noise
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformed_columns(shape, noise, dtype):
    given = {**rounding_of(noise), "signs": signs}
    for x in (torch.randn(shape).to(dtype), awkward_tensor(shape).to(dtype)):
        one, other = (
            fake_quantize(x, "columns", **given, backend=b) for b in ("reference", "triton")
        )
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_a_given_amax_a_part_and_nothing():
    x = torch.randn(8, 64)
    part = Noise(1, 2, 3, "x", torch.tensor([9, 4, 2, 0, 7, 1, 3, 5]), 112)
    given = {"rounding": "stochastic", "noise": part, "amax": torch.tensor(2.0)}
    same_bits(*(quantize(x, **given, backend=b) for b in ("reference", "triton")))
    assert quantize(torch.randn(0, 16), backend="triton").shape == (0, 16)
    assert not quantize(torch.zeros(2, 16), backend="triton").dequantize().any()
