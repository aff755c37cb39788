"""Rotary positions, by what defines them: rotations, whose products know only distances."""

import torch

from nemotron3.ops.rotary import rotate
from tests.ops.contract import randn
from tests.tolerances import FLOAT64

THETA = 10_000.0


def test_position_zero_changes_nothing_and_lengths_stay(assert_close):
    x = randn(5, 2, 6)
    assert torch.equal(rotate(x, torch.zeros(5, dtype=torch.long), THETA), x)
    turned = rotate(x, torch.arange(5) * 1000, THETA)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), FLOAT64)


def test_a_product_depends_on_the_distance_alone(assert_close):
    q, k = randn(1, 3, 8), randn(1, 3, 8)

    def product(i, j):
        positions = [torch.tensor([p]) for p in (i, j)]
        turned = [rotate(t, p, THETA) for t, p in zip((q, k), positions, strict=True)]
        return (turned[0] * turned[1]).sum(-1)

    assert_close(product(107, 100), product(7, 0), FLOAT64)
    assert not torch.allclose(product(8, 0), product(7, 0))


def test_gradcheck():
    x = randn(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotate(t, torch.tensor([0, 3, 70]), THETA), x)
