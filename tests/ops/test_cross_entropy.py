"""The fused loss against the plain one, and that it never holds all logits."""

from functools import partial

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.ops.cross_entropy import linear_cross_entropy, linear_kl_divergence
from tests.ops.contract import outputs_and_gradients, randn
from tests.ops.native import assert_native_equals_reference, needs_compiler
from tests.tolerances import FLOAT64


def operands(tokens=11, d=4, vocab=9):
    targets = torch.randint(vocab, (tokens,))
    weights = torch.rand(tokens, dtype=torch.float64)
    weights[2] = 0.0
    return targets, weights, [randn(tokens, d), randn(vocab, d)]


def loss(targets, weights, backend, max_logits=1 << 22):
    return lambda h, w: linear_cross_entropy(
        h, w, targets, weights, max_logits=max_logits, backend=backend
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("max_logits", [1, 18, 40, 1 << 22])
def test_equals_reference(max_logits, assert_close):
    targets, weights, inputs = operands()
    expected = outputs_and_gradients(loss(targets, weights, "reference"), inputs)
    actual = outputs_and_gradients(loss(targets, weights, "torch", max_logits), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


def test_best_guess_is_counted():
    targets, weights, (h, w) = operands()
    expected = loss(targets, weights, "reference")(h, w).correct
    assert torch.equal(loss(targets, weights, "torch")(h, w).correct, expected)


def test_gradcheck():
    targets, weights, inputs = operands(tokens=5)
    call = loss(targets, weights, "torch", max_logits=18)
    assert torch.autograd.gradcheck(
        lambda h, w: call(h, w).total * 3, [t.requires_grad_() for t in inputs]
    )


def test_at_most_the_asked_logits_exist(monkeypatch):
    seen = []
    logsumexp = torch.Tensor.logsumexp

    def spy(logits, *args, **kwargs):
        seen.append(logits.numel())
        return logsumexp(logits, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", spy)
    targets, weights, inputs = operands(tokens=50)
    loss(targets, weights, "torch", max_logits=30)(*inputs)
    assert max(seen) <= 30
    assert sum(seen) == 50 * 9


def test_bfloat16_accumulates_the_weight_gradient_in_float32():
    """Many small contributions survive: summed in bfloat16 they would be lost."""
    tokens = 4096
    h = torch.full((tokens, 2), 1.0).bfloat16()
    w = torch.zeros(3, 2, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    weights = torch.full((tokens,), 0.01)
    linear_cross_entropy(h, w, targets, weights, max_logits=3).total.backward()
    assert w.grad is not None
    assert w.grad[0, 0].item() == pytest.approx(-tokens * 0.01 * 2 / 3, rel=1e-2)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradients(off, monkeypatch):
    targets, weights, (h, w) = operands()
    w.requires_grad_()
    monkeypatch.setattr(torch.Tensor, "exp_", None)
    with off():
        assert torch.isfinite(loss(targets, weights, "torch")(h, w).total)


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("max_logits", [1, 300, 1 << 22])
@pytest.mark.parametrize(("tokens", "d", "vocab"), [(3, 4, 1), (11, 4, 9), (40, 33, 150)])
def test_native_equals_reference(max_logits, tokens, d, vocab, assert_close):
    targets, weights, inputs = operands(tokens, d, vocab)
    assert_native_equals_reference(
        lambda backend: loss(targets, weights, backend, max_logits), inputs, assert_close
    )


@needs_compiler
def test_native_scales_what_comes_from_above():
    targets, weights, inputs = operands(40, 33, 150)
    h, w = (t.float().requires_grad_() for t in inputs)
    total = loss(targets, weights.float(), "native")(h, w).total
    once = torch.autograd.grad(total, (h, w), retain_graph=True)
    thrice = torch.autograd.grad(total * 3, (h, w))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@needs_compiler
def test_native_says_when_there_is_no_number():
    targets, weights, inputs = operands(40, 33, 150)
    h, w = (t.float() for t in inputs)
    h[7] = torch.nan
    losses = loss(targets, weights.float(), "native")(h, w).per_token
    assert losses.isnan().nonzero().tolist() == [[7]]


def divergence(weights, backend, max_logits=1 << 22):
    def call(h, w, teacher_h, teacher_w):
        return linear_kl_divergence(
            h, w, teacher_h, teacher_w, weights, max_logits=max_logits, backend=backend
        )

    return call


def pair(tokens=11, vocab=9):
    """A student and a teacher of another width."""
    inputs = [randn(tokens, 4), randn(vocab, 4), randn(tokens, 6), randn(vocab, 6)]
    weights = torch.rand(tokens, dtype=torch.float64)
    weights[2] = 0.0
    return weights, inputs


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("max_logits", [1, 18, 40, 1 << 22])
def test_divergence_equals_reference(max_logits, assert_close):
    weights, (h, w, *teacher) = pair()
    calls = (divergence(weights, backend, max_logits) for backend in ("reference", "torch"))
    found = [
        outputs_and_gradients(partial(lambda call, h, w: call(h, w, *teacher), call), [h, w])
        for call in calls
    ]
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected, FLOAT64)


def test_divergence_is_that_of_the_distributions():
    weights, (h, w, *teacher) = pair()
    p, q = ((a @ b.T).softmax(-1) for a, b in (teacher, (h, w)))
    found = divergence(weights, "auto")(h, w, *teacher)
    assert torch.allclose(found.per_token, (p * (p / q).log()).sum(-1))
    assert torch.equal(found.agrees, p.argmax(-1) == q.argmax(-1))
    same = divergence(weights, "auto")(*teacher, *teacher)
    assert same.total.abs() < FLOAT64
    assert same.agrees.all()


def test_gradcheck_of_the_divergence():
    weights, (h, w, *teacher) = pair(5)
    call = divergence(weights, "torch", max_logits=18)
    assert torch.autograd.gradcheck(
        lambda h, w: call(h, w, *teacher).total * 3, [t.requires_grad_() for t in (h, w)]
    )


def test_mistakes_of_the_divergence_are_named():
    weights, (h, w, teacher_h, teacher_w) = pair()
    call = divergence(weights, "auto")
    with pytest.raises(OperandError, match=r"teacher_weight has shape \[8, 6\]; .*\[9, 6\]"):
        call(h, w, teacher_h, teacher_w[:8])
    with pytest.raises(OperandError, match=r"teacher_hidden has shape \[10, 6\]; .*\[11, 6\]"):
        call(h, w, teacher_h[:10], teacher_w)
    with pytest.raises(ValueError, match="max_logits is 0"):
        divergence(weights, "auto", 0)(h, w, teacher_h, teacher_w)
