"""The norms' kernels against the written-out ones, in Triton's interpreter."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.norm import gated_group_norm, rms_norm
from tests.ops.contract import outputs_and_gradients, randn
from tests.tolerances import FLOAT32

BFLOAT16 = 1e-2
"""Inputs are exact; outputs and gradients are rounded once, to 8 bits."""


def plain(backend):
    return lambda x, w: [rms_norm(x, w, 1e-5, backend=backend)]


def gated(groups, backend):
    return lambda x, g, w: [gated_group_norm(x, g, w, groups=groups, eps=1e-5, backend=backend)]


def against_reference(reference, kernel, inputs, tolerance, assert_close):
    expected = outputs_and_gradients(reference, [t.double() for t in inputs])
    actual = outputs_and_gradients(kernel, inputs)
    for a, e, of in zip(actual, expected, [inputs[0], *inputs], strict=True):
        assert a.dtype == of.dtype
        assert_close(a.double(), e, tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (5, 33), (2, 3, 64), (40, 130), (3, 5000)])
def test_rms_norm_equals_reference(shape, assert_close):
    inputs = [randn(*shape).float(), randn(shape[-1]).float()]
    against_reference(plain("reference"), plain("triton"), inputs, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("width", "groups"), [(12, 1), (12, 3), (12, 12), (132, 2), (64, 8)])
@pytest.mark.parametrize("rows", [(1,), (37,), (2, 5)])
def test_gated_group_norm_equals_reference(rows, width, groups, assert_close):
    inputs = [randn(*rows, width).float(), randn(*rows, width).float(), randn(width).float()]
    against_reference(
        gated(groups, "reference"), gated(groups, "triton"), inputs, FLOAT32, assert_close
    )


@pytest.mark.usefixtures("poisoned_memory")
def test_a_program_walks_over_many_blocks(assert_close, monkeypatch):
    from nemotron3.ops.norm import triton as kernels  # noqa: PLC0415 - after the interpreter

    monkeypatch.setattr(kernels, "_PROGRAMS", 6)
    inputs = [randn(90, 24).float(), randn(90, 24).float(), randn(24).float()]
    against_reference(gated(2, "reference"), gated(2, "triton"), inputs, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, assert_close):
    inputs = [randn(9, 24).to(dtype), randn(9, 24).to(dtype), randn(24).float()]
    against_reference(gated(3, "reference"), gated(3, "triton"), inputs, BFLOAT16, assert_close)
    plain_inputs = [inputs[0], inputs[2]]
    against_reference(plain("reference"), plain("triton"), plain_inputs, BFLOAT16, assert_close)


def test_half_precision_is_normed_in_float32():
    """In float16, since the interpreter rounds to bfloat16 by cutting off."""
    x, weight = torch.randn(4, 64).half(), torch.randn(64)
    wide = rms_norm(x.float(), weight, 1e-5, backend="triton")
    assert torch.equal(rms_norm(x, weight, 1e-5, backend="triton"), wide.half())


def test_a_slice_of_columns_is_read_in_place():
    wide, weight = randn(7, 40).float(), randn(12).float()
    inputs = [wide[:, 3:15], wide[:, 20:32], weight]
    sliced = gated(3, "triton")(*inputs)
    copied = gated(3, "triton")(*(t.contiguous() for t in inputs))
    assert torch.equal(sliced[0], copied[0])


def test_company_changes_no_bit():
    x, weight = randn(20, 48).float(), randn(48).float()
    together = rms_norm(x, weight, 1e-5, backend="triton")
    alone = rms_norm(x[13:14], weight, 1e-5, backend="triton")
    assert torch.equal(together[13:14], alone)


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="'rms_norm' computes in float32"):
        rms_norm(randn(2, 3), randn(3), 1e-5, backend="triton")
