"""The choice of experts: every backend against the formula, and what must come through it."""

import pytest
import torch

from nemotron3.errors import ConfigError
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


def given_indices(tokens, experts, choices):
    return torch.rand(tokens, experts).topk(choices).indices


@needs_compiler
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 4, 4), (5, 8, 3), (300, 67, 22)])
def test_given_experts_are_weighed_by_these_scores_on_every_backend(
    tokens, experts, choices, scoring, normalise, assert_close
):
    given = {"choices": choices, "scoring": scoring, "normalise": normalise, "scale": 2.5}
    logits, bias = 3 * randn(tokens, experts), 0.1 * randn(experts)
    indices = given_indices(tokens, experts, choices)
    factors = torch.linspace(-1, 2, choices, dtype=torch.float64)
    found = {}
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
        x = logits.to(dtype).detach().requires_grad_()
        chosen, weights, scores = route(
            x, bias.to(dtype), indices=indices, backend=backend, **given
        )
        assert torch.equal(chosen, indices)
        (gradient,) = torch.autograd.grad((weights * factors.to(dtype)).sum(), x)
        found[backend] = (weights.detach(), scores.detach(), gradient)
    x = logits.detach().requires_grad_()
    scores = x.sigmoid() if scoring == "sigmoid" else x.softmax(-1)
    weights = scores.gather(1, indices) * 2.5
    if normalise:
        weights = weights / scores.gather(1, indices).sum(-1, keepdim=True)
    (gradient,) = torch.autograd.grad((weights * factors).sum(), x)
    for parts in found.values():
        for mine, wanted in zip(parts, (weights.detach(), scores.detach(), gradient), strict=True):
            assert_close(mine.double(), wanted, FLOAT32)


@needs_compiler
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_what_was_chosen_is_chosen_again_bit_for_bit(backend, with_gradient):
    logits, bias = torch.randn(40, 20, requires_grad=with_gradient), torch.randn(20)
    chosen = route(logits, bias, backend=backend, **CASES)
    indices = chosen[0].clone()
    again = route(logits, torch.zeros(20), indices=indices, backend=backend, **CASES)
    assert all(torch.equal(one, two) for one, two in zip(chosen, again, strict=True))
    assert torch.equal(indices, chosen[0])  # given indices are not changed


@needs_compiler
def test_given_experts_may_be_columns_of_a_wider_tensor():
    logits, wide = torch.randn(6, 20), given_indices(6, 20, 9)
    view = wide[:, 2:5]
    of_a_copy = route(logits, torch.zeros(20), indices=view.clone(), backend="native", **CASES)
    found = route(logits, torch.zeros(20), indices=view, backend="native", **CASES)
    assert all(torch.equal(one, two) for one, two in zip(found, of_a_copy, strict=True))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"shape \[3, 2\]; it must be .*\[3, 3\]"),
        (torch.zeros(3, 3), "is torch.float32"),
        (torch.tensor([[0, 1, 2], [0, 1, 8], [0, 1, 2]]), r"indices\[1\] is \[0, 1, 8\]; .*0 to 7"),
        (torch.tensor([[0, 1, 2], [0, 1, 2], [-1, 1, 2]]), r"indices\[2\] is \[-1, 1, 2\]"),
        (torch.tensor([[0, 1, 0], [0, 1, 2], [0, 1, 2]]), r"indices\[0\] is .*different experts"),
    ],
)
def test_experts_that_cannot_be_chosen_are_refused(indices, message, backend):
    with pytest.raises(ConfigError, match=message):
        route(torch.randn(3, 8), torch.zeros(8), indices=indices, backend=backend, **CASES)


def test_no_tokens_have_no_experts():
    none = torch.empty(0, 3, dtype=torch.int64)
    chosen = route(torch.empty(0, 8), torch.zeros(8), indices=none, **CASES)
    assert [list(part.shape) for part in chosen] == [[0, 3], [0, 3], [0, 8]]
