"""The causal convolution against the written-out one."""

import pytest
import torch

from nemotron3.ops.conv import causal_conv
from nemotron3.ops.segments import Segments
from tests.ops.contract import outputs_and_gradients, randn
from tests.tolerances import FLOAT64


def convolution(lengths, backend):
    segments = Segments(lengths)
    return lambda x, w, b, t: causal_conv(
        x, w, b, segments=segments, conv_states=t, backend=backend
    )


def operands(lengths, channels=3, taps=4):
    return [
        randn(sum(lengths), channels),
        randn(channels, taps),
        randn(channels),
        randn(len(lengths), taps - 1, channels),
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("lengths", [(1,), (2,), (9,), (5, 5), (1, 7, 3), (1, 1)])
def test_equals_reference(lengths, taps, assert_close):
    inputs = operands(lengths, taps=taps)
    expected = outputs_and_gradients(convolution(lengths, "reference"), inputs)
    actual = outputs_and_gradients(convolution(lengths, "torch"), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


def test_no_tail_means_zeros_before():
    x, w, b, t = operands((6,))
    implicit, _ = causal_conv(x, w, b, segments=Segments((6,)))
    explicit, _ = causal_conv(x, w, b, segments=Segments((6,)), conv_states=torch.zeros_like(t))
    assert torch.equal(implicit, explicit)


def test_without_bias(assert_close):
    x, w, _, t = operands((6,))
    expected, _ = convolution((6,), "reference")(x, w, None, t)
    actual, _ = convolution((6,), "torch")(x, w, None, t)
    assert_close(actual, expected, FLOAT64)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in operands((3, 5), channels=2)]
    assert torch.autograd.gradcheck(convolution((3, 5), "torch"), inputs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_half_precision_is_rounded_once(backend):
    """Taps are summed in float32 whatever the operands are; outputs keep the dtype of x."""
    inputs = [t.bfloat16() for t in operands((5, 2))]
    exact = convolution((5, 2), backend)(*(t.float() for t in inputs))
    for a, e in zip(convolution((5, 2), backend)(*inputs), exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, e.bfloat16())
