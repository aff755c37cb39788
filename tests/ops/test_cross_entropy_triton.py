"""The fused loss's kernel against the plain loss, in Triton's interpreter."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.cross_entropy import linear_cross_entropy
from tests.ops.contract import outputs_and_gradients
from tests.ops.test_cross_entropy import loss, operands
from tests.tolerances import FLOAT32

BFLOAT16 = 2e-2
"""Logits, gradients of logits and results are each rounded, to 8 bits."""


def against_reference(tokens, vocab, max_logits, dtype, tolerance, assert_close):
    targets, weights, inputs = operands(max(tokens, 3), d=5, vocab=vocab)
    targets, weights = targets[:tokens], weights[:tokens]
    inputs = [inputs[0][:tokens].to(dtype), inputs[1].to(dtype)]
    exact = [t.double() for t in inputs]
    expected = outputs_and_gradients(loss(targets, weights, "reference"), exact)
    actual = outputs_and_gradients(
        loss(targets, weights.float(), "triton", max_logits=max_logits), inputs
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.double(), e, tolerance)
    assert [a.dtype for a in actual[2:]] == [dtype, dtype]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("max_logits", [1, 100, 1 << 22])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 33), (11, 33), (7, 9), (5, 64), (3, 2)])
def test_equals_reference(tokens, vocab, max_logits, assert_close):
    against_reference(tokens, vocab, max_logits, torch.float32, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_a_row_is_read_in_blocks(assert_close, monkeypatch):
    from nemotron3.ops.cross_entropy import triton as kernels  # noqa: PLC0415 - after it

    monkeypatch.setattr(kernels, "_BLOCK", 16)
    against_reference(6, 70, 200, torch.float32, FLOAT32, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, assert_close):
    against_reference(11, 33, 100, dtype, BFLOAT16, assert_close)


def test_best_guess_is_counted_and_ties_go_to_the_first():
    targets, weights, (h, w) = operands(tokens=40)
    w[5] = w[2]
    w[1] = 4 * w[0]
    h, w, weights = h.float(), w.float(), weights.float()
    best = (h @ w.T).argmax(-1)
    targets[::2] = best[::2]
    targets[1::4] = 5
    expected = best == targets
    assert expected.any()
    assert not expected.all()
    assert torch.equal(loss(targets, weights, "triton")(h, w).correct, expected)


def test_weight_zero_gives_no_gradient():
    targets, weights, inputs = operands()
    h, w = (t.float().requires_grad_() for t in inputs)
    d_hidden, _ = torch.autograd.grad(loss(targets, weights.float(), "triton")(h, w).total, [h, w])
    assert (d_hidden[2] == 0).all()
    assert (d_hidden[3] != 0).any()


def test_large_logits_stay_finite():
    h = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    w = torch.tensor([[1.0], [0.0], [-1.0]])
    scored = linear_cross_entropy(h, w, torch.tensor([2, 2]), torch.ones(2), backend="triton")
    assert scored.per_token.tolist() == [600.0, 0.0]
    (gradient,) = torch.autograd.grad(scored.total, [h])
    assert gradient.flatten().tolist() == [2.0, 0.0]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradients(off, monkeypatch):
    targets, weights, inputs = operands()
    h, w = (t.float().requires_grad_() for t in inputs)
    monkeypatch.setattr(torch, "zeros_like", None)
    with off():
        assert torch.isfinite(loss(targets, weights.float(), "triton")(h, w).total)


@pytest.mark.parametrize(
    ("tokens", "max_logits", "sizes"),
    [(11, 33 * 5, [4, 4, 3]), (11, 1, [1] * 11), (11, None, [11]), (0, None, [])],
)
def test_chunks_are_as_few_and_as_equal_as_the_room_allows(tokens, max_logits, sizes, monkeypatch):
    targets, weights, (h, w) = operands(vocab=33)
    seen, products = [], torch.Tensor.__matmul__

    def spy(a, b):
        seen.append(len(a))
        return products(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    scored = loss(targets[:tokens], weights[:tokens].float(), "triton", max_logits=max_logits)
    with torch.no_grad():
        assert scored(h[:tokens].float(), w.float()).per_token.shape == (tokens,)
    assert seen == sizes


def test_float64_is_refused():
    targets, weights, inputs = operands()
    with pytest.raises(BackendUnavailableError, match="'cross_entropy' computes in float32"):
        loss(targets, weights, "triton")(*inputs)


def test_a_target_outside_the_vocabulary_shows_as_a_loss_that_is_no_number():
    """On a GPU nobody looks at the values of targets, so the kernel is called as it is there."""
    from nemotron3.ops.cross_entropy.triton import linear_cross_entropy_triton  # noqa: PLC0415

    targets = torch.tensor([1, -100, 33, 2])
    h, w = torch.randn(4, 5), torch.randn(33, 5)
    _, losses, _ = linear_cross_entropy_triton(h, w, targets, torch.ones(4), None)
    assert losses.isnan().tolist() == [False, True, True, False]
