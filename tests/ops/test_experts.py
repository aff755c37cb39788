"""Routed experts in groups against one token at a time."""

import pytest
import torch

from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.experts import routed_experts
from tests.ops.contract import outputs_and_gradients, randn
from tests.tolerances import FLOAT64


def operands(tokens, experts, k, d=6, width=5, up_rows=1):
    indices = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    return indices, [
        randn(tokens, d),
        torch.rand(tokens, k, dtype=torch.float64),
        randn(experts, width * up_rows, d),
        randn(experts, d, width),
    ]


def mixture(indices, activation, backend):
    return lambda x, w, up, down: [
        routed_experts(x, indices, w, up, down, activation=activation, backend=backend)
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 1), (9, 4, 2), (3, 16, 3), (40, 2, 2)])
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
def test_equals_reference(tokens, experts, k, activation, up_rows, assert_close):
    indices, inputs = operands(tokens, experts, k, up_rows=up_rows)
    expected = outputs_and_gradients(mixture(indices, activation, "reference"), inputs)
    actual = outputs_and_gradients(mixture(indices, activation, "torch"), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


def test_an_expert_nobody_chose_gets_zero_gradient():
    indices, inputs = operands(5, 4, 2)
    indices = indices % 2
    *_, d_up, d_down = outputs_and_gradients(mixture(indices, "relu2", "torch"), inputs)
    assert (d_up[2:] == 0).all()
    assert (d_down[2:] == 0).all()
    assert (d_up[:2] != 0).any()


@pytest.mark.parametrize("others", range(12))
def test_company_changes_no_bit(others):
    """A token's result does not depend on how many others chose the same expert."""
    x, up, down = torch.randn(12, 64), torch.randn(2, 48, 64), torch.randn(2, 64, 48)
    alone = torch.ones(12, 1, dtype=torch.long)
    alone[0] = 0
    crowded = alone.clone()
    crowded[1 : 1 + others] = 0
    weights = torch.ones(12, 1)
    results = [
        routed_experts(x, indices, weights, up, down, activation="relu2")[0]
        for indices in (alone, crowded)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_gradcheck(activation):
    indices, inputs = operands(4, 3, 2, up_rows=2 if activation == "swiglu" else 1)
    call = mixture(indices, activation, "torch")
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


def test_asking_for_a_missing_backend_is_an_error(monkeypatch):
    indices, inputs = operands(2, 2, 1)
    with pytest.raises(BackendUnavailableError, match=r"'experts' has no backend 'tpu'.*torch"):
        mixture(indices, "relu2", "tpu")(*inputs)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton backend of 'experts' needs"):
        mixture(indices, "relu2", "triton")(*inputs)
