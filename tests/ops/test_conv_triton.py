"""The convolution's kernels against the written-out one, in Triton's interpreter."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.conv import causal_conv
from nemotron3.ops.segments import Segments
from tests.ops.contract import outputs_and_gradients, randn
from tests.ops.test_conv import convolution, operands
from tests.tolerances import FLOAT32

BFLOAT16 = 1e-2
"""Inputs are exact; outputs and gradients are rounded once, to 8 bits."""


def against_reference(lengths, inputs, tolerance, assert_close):
    exact = [t.double() for t in inputs]
    expected = outputs_and_gradients(convolution(lengths, "reference"), exact)
    actual = outputs_and_gradients(convolution(lengths, "triton"), inputs)
    for a, e, of in zip(actual[2:], expected[2:], inputs, strict=True):
        assert a.dtype == of.dtype
        assert_close(a.double(), e, tolerance)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert_close(a.double(), e, tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("lengths", [(1,), (7,), (16, 16), (5, 1, 33, 16), (1, 2, 1)])
def test_equals_reference(lengths, taps, assert_close):
    inputs = [t.float() for t in operands(lengths, channels=7, taps=taps)]
    against_reference(lengths, inputs, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_many_blocks_and_spans_of_them(assert_close, monkeypatch):
    from nemotron3.ops.conv import triton as kernels  # noqa: PLC0415 - after the interpreter

    monkeypatch.setattr(kernels, "_PROGRAMS", 4)
    inputs = [t.float() for t in operands((70, 3, 90), channels=130)]
    against_reference((70, 3, 90), inputs, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, assert_close):
    inputs = [t.to(dtype) for t in operands((5, 1, 33, 16), channels=7)]
    against_reference((5, 1, 33, 16), inputs, BFLOAT16, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_a_slice_of_columns_is_read_in_place(assert_close):
    x, w, b, t = (t.float() for t in operands((5, 4), channels=6))
    wide = torch.cat([randn(9, 3).float(), x, randn(9, 2).float()], dim=1)
    expected = outputs_and_gradients(convolution((5, 4), "triton"), [x, w, b, t])
    actual = outputs_and_gradients(
        lambda wide, *rest: convolution((5, 4), "triton")(wide[:, 3:9], *rest), [wide, w, b, t]
    )
    actual[2] = actual[2][:, 3:9]
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_without_bias_and_tails(assert_close):
    x, w, _, _ = (t.float() for t in operands((6, 3)))
    segments = Segments((6, 3))
    expected, actual = (
        outputs_and_gradients(
            lambda x, w, b=backend: causal_conv(x, w, None, segments=segments, backend=b),
            [x, w],
        )
        for backend in ("reference", "triton")
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT32)


def test_a_neighbour_changes_no_bit():
    x, w, b, t = (t.float() for t in operands((13, 20)))
    before, _ = convolution((13, 20), "triton")(x, w, b, t)
    x[12] += 1.0
    after, _ = convolution((13, 20), "triton")(x, w, b, t)
    assert not torch.equal(before[12], after[12])
    assert torch.equal(before[13:], after[13:])


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="'conv' computes in float32"):
        convolution((5,), "triton")(*operands((5,)))
