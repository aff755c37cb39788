"""Dense products against the sum that defines them."""

import pytest
import torch

from nemotron3.ops.linear import linear, linear_parts
from tests.ops.contract import outputs_and_gradients, randn
from tests.ops.native import assert_native_equals_reference, needs_compiler
from tests.tolerances import FLOAT32, FLOAT64


def product(backend):
    return lambda x, w: [linear(x, w, backend=backend)]


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_equals_reference(shape, assert_close):
    inputs = [randn(*shape), randn(5, 7)]
    expected = outputs_and_gradients(product("reference"), inputs)
    for a, e in zip(outputs_and_gradients(product("torch"), inputs), expected, strict=True):
        assert_close(a, e, FLOAT64)


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 241])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (16, 16), (67, 129), (130, 300)])
def test_native_equals_reference(rows, outputs, inputs, assert_close):
    operands = [randn(rows, inputs), randn(outputs, inputs)]
    assert_native_equals_reference(product, operands, assert_close)


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1000, 70, 1100), (130, 1100, 70), (521, 600, 530)])
def test_native_goes_over_blocks_whole(shape, assert_close):
    """More rows, inputs and outputs than one block has, and no multiples of a tile."""
    rows, outputs, inputs = shape
    operands = [randn(rows, inputs).float(), randn(outputs, inputs).float()]
    expected = outputs_and_gradients(product("torch"), [t.double() for t in operands])
    for a, e in zip(outputs_and_gradients(product("native"), operands), expected, strict=True):
        assert_close(a.double(), e, FLOAT32)


def in_parts(sizes):
    return lambda backend: lambda x, w: [*linear_parts(x, w, sizes, backend=backend)]


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 3, 1]])
def test_parts_are_columns_of_the_whole(sizes, assert_close):
    inputs = [randn(2, 3, 7), randn(5, 7)]
    whole = outputs_and_gradients(lambda x, w: linear(x, w).split(sizes, dim=-1), inputs)
    for backend in ("reference", "torch"):
        parts = outputs_and_gradients(in_parts(sizes)(backend), inputs)
        for a, e in zip(parts, whole, strict=True):
            assert_close(a, e, FLOAT64)


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [1, 9, 241])
@pytest.mark.parametrize("sizes", [[700], [1, 699], [130, 300, 270], [257, 1, 1, 441]])
def test_native_parts_equal_reference(rows, sizes, assert_close):
    """Parts whose bounds are not those of a block."""
    operands = [randn(rows, 140), randn(700, 140)]
    assert_native_equals_reference(in_parts(sizes), operands, assert_close)


@needs_compiler
def test_a_part_that_nobody_uses_has_no_gradient_and_others_may_lie_anywhere():
    x, weight = torch.randn(20, 30, requires_grad=True), torch.randn(50, 30, requires_grad=True)
    first, _, last = linear_parts(x, weight, [12, 8, 30])
    turned, wide = torch.randn(12, 20).T, torch.randn(20, 90)[:, 30:60]
    torch.autograd.backward([first, last], [turned, wide])
    dy = torch.cat([turned, torch.zeros(20, 8), wide], dim=1)
    assert torch.equal(x.grad, torch.autograd.grad(linear(x, weight), x, dy)[0])
    assert torch.equal(weight.grad, torch.autograd.grad(linear(x, weight), weight, dy)[0])


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
def test_no_rows_give_no_rows_and_no_gradient():
    x = torch.empty(0, 30, requires_grad=True)
    weight = torch.randn(20, 30, requires_grad=True)
    y = linear(x, weight, backend="native")
    y.sum().backward()
    assert y.shape == (0, 20)
    assert x.grad.shape == (0, 30)
    assert torch.equal(weight.grad, torch.zeros(20, 30))


@needs_compiler
def test_native_takes_columns_of_a_wider_tensor():
    wide, weight = torch.randn(20, 50), torch.randn(12, 30)
    view = wide[:, 7:37]
    assert torch.equal(linear(view, weight), linear(view.clone(), weight))
    turned = torch.randn(30, 20).T
    assert torch.equal(linear(turned, weight), linear(turned.contiguous(), weight))
    batched = torch.randn(2, 20, 50)[:, :, 7:37]
    assert torch.equal(linear(batched, weight), linear(batched.contiguous(), weight))


@needs_compiler
@pytest.mark.parametrize("rows", [2, 8, 12, 500])
def test_company_changes_no_bit(rows):
    """A row's result does not depend on the number of other rows."""
    x, weight = torch.randn(rows, 96), torch.randn(80, 96)
    others = torch.cat([x[:1], torch.randn(rows - 1, 96)])
    assert torch.equal(linear(x, weight)[0], linear(others, weight)[0])
    if rows <= 8:
        assert torch.equal(linear(x, weight)[:1], linear(x[:1], weight))


@needs_compiler
def test_nan_and_infinity_arrive():
    x, weight = torch.ones(10, 40), torch.ones(20, 40)
    x[3, 5], x[4, 5] = torch.nan, torch.inf
    y = linear(x, weight)
    assert y[3].isnan().all()
    assert y[4].isinf().all()
    assert (y[:3] == 40).all()
