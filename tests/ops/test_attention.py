"""Attention against the reference, with and without cached keys."""

import pytest
import torch

from nemotron3.ops.attention import attention
from nemotron3.ops.attention import torch as torch_attention
from nemotron3.ops.segments import Segments
from tests.ops.contract import outputs_and_gradients, randn
from tests.tolerances import FLOAT64


def attend(queries, keys, backend):
    return lambda q, k, v: [
        attention(q, k, v, queries=Segments(queries), keys=Segments(keys), backend=backend)
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((5,), (5,)),
        ((1,), (1,)),
        ((3, 3), (3, 3)),
        ((2, 7, 2), (2, 7, 2)),
        ((1, 1), (4, 9)),
        ((1, 1), (6, 6)),
        ((3,), (8,)),
        ((3, 1, 4), (8, 1, 4)),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_equals_reference(queries, keys, heads, kv_heads, assert_close):
    inputs = [
        randn(sum(queries), heads, 8),
        randn(sum(keys), kv_heads, 8),
        randn(sum(keys), kv_heads, 8),
    ]
    expected = outputs_and_gradients(attend(queries, keys, "reference"), inputs)
    actual = outputs_and_gradients(attend(queries, keys, "torch"), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


@pytest.mark.parametrize("way", ["some queries at a time", "flash attention's corner"])
def test_queries_behind_many_keys(way, assert_close, monkeypatch):
    if way == "some queries at a time":
        monkeypatch.setattr(torch_attention, "_MAX_SCORES", 4 * 40 * 3)
    else:  # without a device the corner is written out by PyTorch itself
        monkeypatch.setattr(torch_attention, "can_use_flash_attention", lambda _: True)
    inputs = [randn(25, 4, 8), randn(48, 2, 8), randn(48, 2, 8)]
    expected = outputs_and_gradients(attend((14, 11), (33, 15), "reference"), inputs)
    actual = outputs_and_gradients(attend((14, 11), (33, 15), "torch"), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


def test_gradcheck():
    inputs = [randn(5, 2, 3), randn(7, 1, 3), randn(7, 1, 3)]
    assert torch.autograd.gradcheck(
        attend((2, 3), (4, 3), "torch"), [t.requires_grad_() for t in inputs]
    )
