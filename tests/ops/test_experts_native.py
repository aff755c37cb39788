"""The compiled routed experts against one token at a time."""

import pytest
import torch

from nemotron3.ops.experts import activate, routed_experts
from tests.ops.contract import randn
from tests.ops.native import assert_native_equals_reference, needs_compiler
from tests.ops.test_experts import mixture, operands

pytestmark = needs_compiler


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(1, 4, 1), (9, 4, 2), (24, 4, 2), (25, 4, 2), (3, 16, 3), (150, 2, 2)],
)
@pytest.mark.parametrize(("d", "width"), [(6, 5), (16, 32), (33, 70)])
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
def test_equals_reference(tokens, experts, k, d, width, activation, up_rows, assert_close):
    indices, inputs = operands(tokens, experts, k, d, width, up_rows)
    assert_native_equals_reference(lambda b: mixture(indices, activation, b), inputs, assert_close)


@pytest.mark.parametrize("tokens", [5, 40])
def test_an_expert_nobody_chose_gets_zero_gradient(tokens):
    indices, inputs = operands(tokens, 4, 2)
    leaves = [t.float().requires_grad_() for t in inputs]
    [y] = mixture(indices % 2, "relu2", "native")(*leaves)
    *_, d_up, d_down = torch.autograd.grad(y.sum(), leaves)
    assert (d_up[2:] == 0).all()
    assert (d_down[2:] == 0).all()
    assert (d_up[:2] != 0).any()


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_operands_get_no_gradient(frozen):
    indices, inputs = operands(20, 4, 2)
    leaves = [t.float().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    [y] = mixture(indices, "relu2", "native")(*leaves)
    y.sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(4)]


@pytest.mark.parametrize("tokens", [12, 40])
def test_company_changes_no_bit(tokens):
    """A token's result does not depend on how many others chose the same expert."""
    x, up, down = torch.randn(tokens, 64), torch.randn(2, 48, 64), torch.randn(2, 64, 48)
    weights = torch.ones(tokens, 1)
    results = []
    for others in range(tokens):
        indices = torch.ones(tokens, 1, dtype=torch.long)
        indices[: 1 + others] = 0
        results.append(routed_experts(x, indices, weights, up, down, activation="relu2")[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("tokens", [20, 40])
def test_a_broken_token_breaks_no_other(tokens):
    indices, inputs = operands(tokens, 4, 2)
    x, weights, up, down = (t.float() for t in inputs)
    [whole] = mixture(indices, "relu2", "native")(x, weights, up, down)
    x[3] = torch.nan
    [broken] = mixture(indices, "relu2", "native")(x, weights, up, down)
    assert broken[3].isnan().all()
    others = torch.arange(tokens) != 3
    assert torch.equal(whole[others], broken[others])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(2,), (1, 18), (7, 64), (2, 300, 130)])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_activations_equal_reference(shape, activation, assert_close):
    assert_native_equals_reference(
        lambda backend: lambda h: [activate(h, activation, backend=backend)],
        [randn(*shape)],
        assert_close,
    )
