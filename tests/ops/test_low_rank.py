"""W + scale B A in slices: the definition, its gradients, and one rounding."""

import pytest
import torch

from nemotron3.ops.weights import add_low_rank, low_rank
from tests.tolerances import FLOAT32, FLOAT64

SHAPES = [(7, 5), (1, 3), (5, 7, 3), (1, 2, 2)]


def operands(shape, dtype=torch.float64, rank=2):
    *experts, d_out, d_in = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (*experts, rank, d_in), (*experts, d_out, rank))
    W, A, B = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    return W, A.requires_grad_(), B.requires_grad_()


def definition(W, A, B, scale):
    return W + scale * torch.einsum("...or,...ri->...oi", B, A)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [1, 10, 12, 10**6])
def test_slices_compute_the_definition(monkeypatch, shape, elements):
    monkeypatch.setattr(low_rank, "SLICE", elements)
    W, A, B = operands(shape)
    grad = torch.randn(shape, dtype=torch.float64)
    found, expected = add_low_rank(W, A, B, 0.7, dtype=torch.float64), definition(W, A, B, 0.7)
    assert (found - expected).abs().max() <= FLOAT64
    ours, theirs = (torch.autograd.grad(result, (A, B), grad) for result in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= FLOAT64 * other.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_slices_change_no_bit(monkeypatch, shape):
    W, A, B = operands(shape, torch.float32)
    with torch.no_grad():
        whole = add_low_rank(W.bfloat16(), A, B, 0.7, dtype=torch.bfloat16)
        monkeypatch.setattr(low_rank, "SLICE", 1)
        assert torch.equal(add_low_rank(W.bfloat16(), A, B, 0.7, dtype=torch.bfloat16), whole)


def test_a_narrow_weight_is_added_to_in_float32_and_rounded_once():
    W, A, B = operands((9, 6), torch.float32)
    narrow = W.bfloat16()
    sum_ = add_low_rank(narrow, A, B, 1e-3, dtype=torch.bfloat16)
    assert torch.equal(sum_, definition(narrow.float(), A, B, 1e-3).bfloat16())
    assert add_low_rank(narrow, A, B, 1e-3, dtype=torch.float32).dtype == torch.float32
    grad = torch.randn(9, 6).bfloat16()
    dA, dB = torch.autograd.grad(sum_, (A, B), grad)
    assert dA.dtype == dB.dtype == torch.float32
    expected = 1e-3 * B.detach().T @ grad.float()
    assert (dA - expected).abs().max() <= FLOAT32 * expected.abs().max()


def test_a_frozen_weight_has_no_gradient_and_nothing_is_kept_without_one():
    W, A, B = operands((4, 3))
    W.requires_grad_()
    add_low_rank(W, A, B, 1.0, dtype=torch.float64).sum().backward()
    assert W.grad is None
    with torch.no_grad():
        assert not add_low_rank(W, A, B, 1.0, dtype=torch.float64).requires_grad
