"""Compiled attention in blocks against the written-out one, at lengths that fit no block."""

import pytest
import torch

from nemotron3.ops.attention import attention
from nemotron3.ops.segments import Segments
from tests.ops.contract import randn
from tests.ops.native import assert_native_equals_reference, needs_compiler
from tests.ops.test_attention import attend
from tests.tolerances import FLOAT32

pytestmark = needs_compiler


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((1,), (1,)),
        ((48,), (48,)),
        ((65,), (65,)),
        ((200, 3, 49), (200, 3, 49)),
        ((1, 1), (4, 130)),
        ((50,), (130,)),
        ((64, 7), (64, 300)),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("head_dim", [1, 16, 40, 130])
def test_equals_reference(queries, keys, heads, kv_heads, head_dim, assert_close):
    inputs = [
        randn(sum(queries), heads, head_dim),
        randn(sum(keys), kv_heads, head_dim),
        randn(sum(keys), kv_heads, head_dim),
    ]
    assert_native_equals_reference(lambda b: attend(queries, keys, b), inputs, assert_close)


@pytest.mark.parametrize("shift", [-95.0, 95.0])
def test_scores_far_from_zero(shift, assert_close):
    """All scores of a row far below or above zero: only their differences count."""
    q, k, v = (randn(200, 1, 4).float() for _ in range(3))
    q[..., 0], k[..., 0] = 2.0, shift
    [expected] = attend((200,), (200,), "reference")(q.double(), k.double(), v.double())
    [actual] = attend((200,), (200,), "native")(q, k, v)
    assert_close(actual.double(), expected, FLOAT32)


def test_reads_columns_of_a_wider_stream(assert_close):
    def sliced(backend):
        def call(q, k, v):
            wide = torch.cat([q, k, v], dim=1)
            [y] = attend((60,), (60,), backend)(wide[:, :4], wide[:, 4:6], wide[:, 6:])
            return [y.repeat(1, 2, 1)[:, 2:6]]

        return call

    inputs = [randn(60, heads, 8) for heads in (4, 2, 2)]
    assert_native_equals_reference(sliced, inputs, assert_close)


@pytest.mark.parametrize("length", [5, 100])
def test_neighbours_change_no_bit(length):
    alone = [torch.randn(length, heads, 20) for heads in (4, 2, 2)]
    results = []
    for before, after in (([], []), ([70], [3])):
        lengths = Segments((*before, length, *after))
        first = sum(before)
        leaves = [
            torch.cat([torch.ones(first, *t.shape[1:]), t, torch.ones(sum(after), *t.shape[1:])])
            for t in alone
        ]
        leaves = [t.requires_grad_() for t in leaves]
        y = attention(*leaves, queries=lengths, keys=lengths, backend="native")
        (y**2).sum().backward()
        rows = slice(first, first + length)
        results.append([y[rows], *(t.grad[rows] for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("frozen", range(3))
def test_frozen_operands_get_no_gradient(frozen):
    leaves = [torch.randn(9, h, 4).requires_grad_(i != frozen) for i, h in enumerate((4, 2, 2))]
    [y] = attend((9,), (9,), "native")(*leaves)
    y.sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_a_broken_token_breaks_no_earlier_one():
    q, k, v = (torch.randn(100, h, 16) for h in (4, 2, 2))
    k[60] = torch.nan
    [y] = attend((100,), (100,), "native")(q, k, v)
    assert y[60:].isnan().all()
    assert not y[:60].isnan().any()
