"""Routed experts' kernels against one token at a time, in Triton's interpreter."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.experts import routed_experts
from tests.ops.contract import outputs_and_gradients
from tests.ops.test_experts import mixture, operands
from tests.tolerances import FLOAT32

BFLOAT16 = 2e-2
"""Products, activations and results are each rounded, to 8 bits."""


def against_reference(indices, inputs, activation, tolerance, assert_close):
    exact = [t.double() for t in inputs]
    expected = outputs_and_gradients(mixture(indices, activation, "reference"), exact)
    actual = outputs_and_gradients(mixture(indices, activation, "triton"), inputs)
    for a, e, of in zip(actual, expected, [inputs[0], *inputs], strict=True):
        assert a.dtype == of.dtype
        assert_close(a.double(), e, tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 4, 1), (1, 3, 3), (9, 4, 2), (3, 16, 3), (40, 2, 2)]
)
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
def test_equals_reference(tokens, experts, k, activation, up_rows, assert_close):
    indices, inputs = operands(tokens, experts, k, up_rows=up_rows)
    against_reference(indices, [t.float() for t in inputs], activation, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
def test_many_tiles_in_every_direction(activation, up_rows, assert_close):
    indices, inputs = operands(37, 3, 2, d=35, width=20, up_rows=up_rows)
    inputs = [t.float() for t in inputs]
    against_reference(indices, inputs, activation, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
def test_half_precision(dtype, activation, up_rows, assert_close):
    indices, inputs = operands(9, 4, 2, up_rows=up_rows)
    against_reference(indices, [t.to(dtype) for t in inputs], activation, BFLOAT16, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
def test_bfloat16_matrices_are_their_float32_copies(activation, up_rows):
    indices, (x, weights, up, down) = operands(9, 4, 2, up_rows=up_rows)
    inputs = [x.float(), weights.float(), up.bfloat16(), down.bfloat16()]
    call = mixture(indices, activation, "triton")
    expected = outputs_and_gradients(call, [t.float() for t in inputs])
    for ours, theirs in zip(outputs_and_gradients(call, inputs), expected, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("tokens", [1, 30])
def test_tiles_of_a_device(tokens, assert_close, monkeypatch):
    """At the sizes of a GPU, with few rows for each expert and with more."""
    from nemotron3.ops.experts import triton as kernels  # noqa: PLC0415 - after the interpreter

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "_MOST_OF_FEW", 4)
    blocks = kernels._product_blocks(torch.float16, 3 * tokens, 16)
    assert blocks.rows == (16 if tokens == 1 else 128)
    indices, inputs = operands(tokens, 16, 3, d=130, width=70)
    inputs = [t.to(torch.float16) for t in inputs]
    against_reference(indices, inputs, "relu2", BFLOAT16, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_an_expert_nobody_chose_gets_zero_gradient():
    indices, inputs = operands(5, 4, 2)
    inputs = [t.float() for t in inputs]
    *_, d_up, d_down = outputs_and_gradients(mixture(indices % 2, "relu2", "triton"), inputs)
    assert (d_up[2:] == 0).all()
    assert (d_down[2:] == 0).all()
    assert (d_up[:2] != 0).any()


@pytest.mark.usefixtures("poisoned_memory")
def test_weight_zero_silences_a_choice(assert_close):
    indices, inputs = operands(6, 4, 2)
    inputs[1][:, 1] = 0
    inputs[1][2] = 0
    inputs = [t.float() for t in inputs]
    against_reference(indices, inputs, "relu2", FLOAT32, assert_close)
    out, *_ = mixture(indices, "relu2", "triton")(*inputs)
    assert (out[2] == 0).all()


@pytest.mark.usefixtures("poisoned_memory")
def test_evaluation_is_the_same():
    indices, inputs = operands(9, 4, 2)
    leaves = [t.float().requires_grad_() for t in inputs]
    trained, *_ = mixture(indices, "relu2", "triton")(*leaves)
    with torch.no_grad():
        evaluated, *_ = mixture(indices, "relu2", "triton")(*leaves)
    assert torch.equal(trained.detach(), evaluated)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
@pytest.mark.parametrize("frozen", [(), (2,), (3,), (2, 3)])
def test_frozen_matrices_cost_no_gradient(frozen, activation, up_rows, monkeypatch):
    """One of all experts' matrices takes gigabytes in a large model."""
    from nemotron3.ops.experts import triton as kernels  # noqa: PLC0415 - after the interpreter

    made, real = [], kernels._weight_gradient
    monkeypatch.setattr(
        kernels, "_weight_gradient", lambda *args, **kw: (made.append(1), real(*args, **kw))
    )
    indices, inputs = operands(9, 4, 2, up_rows=up_rows)
    found = []
    for still in ((), frozen):
        leaves = [t.float().requires_grad_(i not in still) for i, t in enumerate(inputs)]
        made.clear()
        mixture(indices, activation, "triton")(*leaves)[0].sum().backward()
        found.append([leaf.grad for leaf in leaves])
        assert len(made) == 2 - len(still)
    for i, (expected, actual) in enumerate(zip(*found, strict=True)):
        assert actual is None if i in frozen else torch.equal(actual, expected)


@pytest.mark.parametrize("others", [0, 1, 11, 15, 16, 20])
def test_company_changes_no_bit(others):
    """A token's result does not depend on how many others chose the same expert."""
    x, up, down = torch.randn(24, 20), torch.randn(2, 18, 20), torch.randn(2, 20, 18)
    alone = torch.ones(24, 1, dtype=torch.long)
    alone[0] = 0
    crowded = alone.clone()
    crowded[1 : 1 + others] = 0
    results = [
        routed_experts(
            x, indices, torch.ones(24, 1), up, down, activation="relu2", backend="triton"
        )[0]
        for indices in (alone, crowded)
    ]
    assert torch.equal(*results)


def test_no_tokens():
    indices, inputs = operands(2, 4, 2)
    x, weights, up, down = (t.float() for t in inputs)
    leaves = [x[:0], weights[:0], up, down]
    out, *gradients = outputs_and_gradients(mixture(indices[:0], "relu2", "triton"), leaves)
    assert out.shape == (0, 6)
    assert all((g == 0).all() for g in gradients)


def test_float64_is_refused():
    indices, inputs = operands(2, 2, 1)
    with pytest.raises(BackendUnavailableError, match="'experts' computes in float32"):
        mixture(indices, "relu2", "triton")(*inputs)
