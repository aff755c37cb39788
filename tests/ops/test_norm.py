"""The norms against the written-out ones."""

import pytest
import torch

from nemotron3.ops.norm import gated_group_norm, rms_norm
from tests.ops.contract import outputs_and_gradients, randn
from tests.tolerances import FLOAT64


def test_rms_norm_equals_reference(assert_close):
    inputs = [randn(5, 12), randn(12)]
    expected, actual = (
        outputs_and_gradients(lambda x, w, b=b: [rms_norm(x, w, 1e-5, backend=b)], inputs)
        for b in ("reference", "torch")
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_gated_group_norm_equals_reference(groups, assert_close):
    inputs = [randn(5, 12), randn(5, 12), randn(12)]
    expected, actual = (
        outputs_and_gradients(
            lambda x, g, w, b=b: [gated_group_norm(x, g, w, groups=groups, eps=1e-5, backend=b)],
            inputs,
        )
        for b in ("reference", "torch")
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bfloat16_is_normed_in_float32(backend):
    x = torch.randn(4, 64).bfloat16()
    weight = torch.randn(64)
    wide = rms_norm(x.float(), weight, 1e-5, backend=backend)
    assert torch.equal(rms_norm(x, weight, 1e-5, backend=backend), wide.bfloat16())


def test_gradcheck():
    inputs = [t.requires_grad_() for t in (randn(2, 6), randn(2, 6), randn(6))]
    assert torch.autograd.gradcheck(
        lambda x, g, w: gated_group_norm(x, g, w, groups=2, eps=1e-5), inputs
    )
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), [inputs[0], inputs[2]])
