"""Log-probabilities of given tokens: values and gradients for any gradient of each token."""

import pytest
import torch
from torch.nn import functional as F

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.ops.cross_entropy import linear_cross_entropy, token_logprobs
from tests.ops.contract import outputs_and_gradients, randn
from tests.ops.native import needs_compiler
from tests.tolerances import FLOAT32, FLOAT64

BACKENDS = ["torch", pytest.param("native", marks=needs_compiler), "triton"]
SHAPES = [(1, 4, 1), (1, 5, 33), (11, 4, 9), (40, 33, 150)]


def operands(tokens, d, vocab):
    return torch.randint(vocab, (tokens,)), [randn(tokens, d), randn(vocab, d)]


def logprobs(targets, backend, **given):
    return lambda h, w: [token_logprobs(h, w, targets, backend=backend, **given)]


def test_the_reference_is_the_logarithm_of_the_softmax():
    targets, (h, w) = operands(11, 4, 9)
    expected = -F.cross_entropy(h @ w.T / 0.7, targets, reduction="none")
    found = token_logprobs(h, w, targets, temperature=0.7, backend="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("max_logits", [1, 300, None])
@pytest.mark.parametrize(("tokens", "d", "vocab"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, tokens, d, vocab, max_logits, temperature, assert_close):
    targets, inputs = operands(tokens, d, vocab)
    given = {"max_logits": max_logits, "temperature": temperature}
    expected = outputs_and_gradients(logprobs(targets, "reference", **given), inputs)
    narrow = [t.float() for t in inputs]
    found = outputs_and_gradients(logprobs(targets, backend, **given), narrow)
    for a, e in zip(found, expected, strict=True):
        assert_close(a.double(), e, FLOAT32)


def test_gradcheck():
    targets, inputs = operands(5, 4, 9)
    call = logprobs(targets, "torch", max_logits=18, temperature=0.7)
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


def test_float64(assert_close):
    targets, inputs = operands(11, 4, 9)
    expected = outputs_and_gradients(logprobs(targets, "reference"), inputs)
    for a, e in zip(
        outputs_and_gradients(logprobs(targets, "auto"), inputs), expected, strict=True
    ):
        assert_close(a, e, FLOAT64)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bfloat16(backend, assert_close):
    targets, inputs = operands(11, 5, 33)
    narrow = [t.bfloat16() for t in inputs]
    given = {"temperature": 0.7}
    expected = outputs_and_gradients(
        logprobs(targets, "reference", **given), [t.double() for t in narrow]
    )
    found = outputs_and_gradients(logprobs(targets, backend, **given), narrow)
    assert [a.dtype for a in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for a, e in zip(found, expected, strict=True):
        assert_close(a.double(), e, 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_loss_of_each_token_with_its_sign_turned(backend):
    targets, inputs = operands(40, 33, 150)
    h, w = (t.float() for t in inputs)
    losses = linear_cross_entropy(h, w, targets, torch.ones(40), backend=backend).per_token
    assert torch.equal(token_logprobs(h, w, targets, backend=backend), -losses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learns", [(True, False), (False, True), (False, False)])
def test_only_what_learns_has_gradients(backend, learns):
    targets, inputs = operands(11, 4, 9)
    h, w = (t.float().requires_grad_(wanted) for t, wanted in zip(inputs, learns, strict=True))
    found = token_logprobs(h, w, targets, backend=backend)
    assert found.requires_grad == any(learns)
    if any(learns):
        (found * torch.randn(11)).sum().backward()
    assert (h.grad is not None, w.grad is not None) == learns
    with torch.no_grad():
        assert not token_logprobs(h, w, targets, backend=backend).requires_grad


def test_at_most_the_asked_logits_exist_forward_and_backward(monkeypatch):
    seen, logsumexp = [], torch.Tensor.logsumexp

    def spy(logits, *args, **kwargs):
        seen.append(logits.numel())
        return logsumexp(logits, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", spy)
    targets, inputs = operands(50, 4, 9)
    h, w = (t.requires_grad_() for t in inputs)
    token_logprobs(h, w, targets, max_logits=30, backend="torch").sum().backward()
    assert max(seen) <= 30
    assert sum(seen) == 2 * 50 * 9


def test_a_policy_gradient_of_two_terms(assert_close):
    """A clipped ratio and a penalty, whose gradients are known only after the forward pass."""
    targets, inputs = operands(11, 4, 9)
    old = torch.randn(11, dtype=torch.float64) - 2

    def objective(backend):
        leaves = [t.clone().requires_grad_() for t in inputs]
        new = token_logprobs(*leaves, targets, backend=backend)
        ratio = (new - old).exp()
        (torch.minimum(ratio, ratio.clamp(0.8, 1.2)) - 0.1 * (new - old).square()).sum().backward()
        return [leaf.grad for leaf in leaves]

    for a, e in zip(objective("auto"), objective("reference"), strict=True):
        assert_close(a, e, FLOAT64)
