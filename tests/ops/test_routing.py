"""The choice of experts: every backend against the formula, and what must come through it."""

import pytest
import torch

from nemotron3.ops.routing import route
from tests.ops.contract import randn
from tests.ops.native import needs_compiler
from tests.tolerances import FLOAT32

CASES = {"choices": 3, "scoring": "sigmoid", "normalise": True, "scale": 2.5}


@needs_compiler
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 4, 4), (5, 8, 3), (3, 67, 22)])
def test_native_chooses_as_the_reference(
    tokens, experts, choices, scoring, normalise, assert_close
):
    logits, bias = 3 * randn(tokens, experts), 0.1 * randn(experts)
    given = {"choices": choices, "scoring": scoring, "normalise": normalise, "scale": 2.5}
    expected = route(logits, bias, backend="reference", **given)
    narrow = route(logits.float(), bias.float(), backend="native", **given)
    assert torch.equal(narrow[0], expected[0])
    for mine, wanted in zip(narrow[1:], expected[1:], strict=True):
        assert_close(mine.double(), wanted, FLOAT32)


@needs_compiler
def test_native_reads_columns_of_a_wider_tensor():
    wide, bias = torch.randn(6, 30), torch.randn(20)
    view = wide[:, 3:23]
    of_a_copy = route(view.clone(), bias, backend="native", **CASES)
    for mine, wanted in zip(route(view, bias, backend="native", **CASES), of_a_copy, strict=True):
        assert torch.equal(mine, wanted)


@needs_compiler
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("used", [(1,), (2,), (1, 2)], ids=["weights", "scores", "both"])
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 4, 4), (5, 20, 3), (300, 67, 22)])
def test_native_gradients_are_those_of_the_reference(
    tokens, experts, choices, used, scoring, normalise, assert_close
):
    given = {"choices": choices, "scoring": scoring, "normalise": normalise, "scale": 2.5}
    logits, bias = 3 * randn(tokens, experts), 0.1 * randn(experts)

    def gradient(x, backend):
        x = x.requires_grad_()
        parts = route(x, bias.to(x.dtype), backend=backend, **given)
        weighed = sum((parts[i] * torch.linspace(-1, 2, parts[i].shape[1])).sum() for i in used)
        return torch.autograd.grad(weighed, x)[0]

    mine = gradient(logits.float(), "native")
    assert_close(mine.double(), gradient(logits, "reference"), FLOAT32)


@needs_compiler
def test_of_equals_the_first_counts_and_nan_arrives():
    logits = torch.zeros(2, 9)
    logits[1, 4] = torch.nan
    indices, weights, scores = route(logits, torch.zeros(9), backend="native", **CASES)
    assert indices[0].tolist() == [0, 1, 2]
    assert indices[1].tolist() == [4, 0, 1]
    assert weights[1].isnan().all()
    assert scores[1].isnan().tolist() == [i == 4 for i in range(9)]
