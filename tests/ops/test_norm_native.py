"""The compiled norms against the written-out ones, at widths that fit no vector."""

import pytest
import torch

from nemotron3.ops.norm import gated_group_norm, rms_norm
from tests.ops.contract import randn
from tests.ops.native import assert_native_equals_reference, needs_compiler

pytestmark = needs_compiler


def plain(backend):
    return lambda x, w: [rms_norm(x, w, 1e-5, backend=backend)]


def gated(groups):
    return lambda backend: (
        lambda x, g, w: [gated_group_norm(x, g, w, groups=groups, eps=1e-5, backend=backend)]
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1, 1), (5, 12), (3, 4, 16), (65, 37), (200, 256)])
def test_rms_norm_equals_reference(shape, assert_close):
    assert_native_equals_reference(plain, [randn(*shape), randn(shape[-1])], assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [1, 5, 65, 200])
@pytest.mark.parametrize(("width", "groups"), [(12, 1), (12, 12), (96, 2), (111, 3), (256, 4)])
def test_gated_group_norm_equals_reference(rows, width, groups, assert_close):
    inputs = [randn(rows, width), randn(rows, width), randn(width)]
    assert_native_equals_reference(gated(groups), inputs, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_reads_columns_of_a_wider_stream(assert_close):
    """Operands and gradients are slices of a projection's."""

    def sliced(backend):
        def call(x, w):
            wide = x.repeat(1, 3)
            [y] = gated(2)(backend)(wide[:, 10:30], wide[:, 20:40], w)
            return [y.repeat(1, 3)[:, 20:40]]

        return call

    assert_native_equals_reference(sliced, [randn(7, 20), randn(20)], assert_close)


@pytest.mark.parametrize("frozen", range(3))
def test_frozen_operands_get_no_gradient(frozen):
    inputs = (torch.randn(5, 12), torch.randn(5, 12), torch.randn(12))
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    [y] = gated(3)("native")(*leaves)
    y.sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_company_changes_no_bit():
    x, gate, weight = torch.randn(70, 48), torch.randn(70, 48), torch.randn(48)
    [whole] = gated(2)("native")(x, gate, weight)
    [alone] = gated(2)("native")(x[66:67], gate[66:67], weight)
    assert torch.equal(whole[66:67], alone)


def test_zeros_stay_zeros():
    x = torch.zeros(3, 20, requires_grad=True)
    [y] = plain("native")(x, torch.ones(20))
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
