"""Gradients of the output layer, computed in the forward pass where the token weights are known.

A backend is one function, a `Score`. It computes the logits of some tokens at a time and turns them
into each token's loss and, given a weight for each loss, into the gradients of the weighted sum.
Both operations are built on it:

* The cross-entropy knows its weights beforehand, so its forward pass computes the gradients too:
  three products in all.
* Log-probabilities receive a gradient for each token in the backward pass. It recomputes the logits
  and uses these gradients as the weights: four products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.weights import is_read_wide


class Scored(NamedTuple):
    """Losses and gradients that a backend computes from the logits."""

    losses: Tensor
    """-log softmax(scale hidden weight^T) at each target, in float32 at least, [tokens]."""
    correct: Tensor
    """Whether the target had the largest logit, [tokens]."""
    d_hidden: Tensor | None
    """Gradient of the weighted sum of losses, in the dtype of `hidden`; None if not requested."""
    d_weight: Tensor | None
    """Likewise, summed in float32 at least."""


class Request(NamedTuple):
    """Options of a `Score` besides its tensors."""

    token_weights: Tensor | None
    """Weight of each loss in the sum, in float32 at least; None if no gradient is needed."""
    wants_hidden: bool
    wants_weight: bool
    scale: float
    """Factor of all logits: the inverse of a temperature."""
    max_logits: int | None
    """Most logits that may exist at a time."""


Score = Callable[[Tensor, Tensor, Tensor, Request], Scored]
"""Takes `hidden` [tokens, d], `weight` [vocab, d] and what each token is compared with: `targets`
[tokens], or what a distribution over the vocabulary is computed from.

The weight has the dtype of `hidden`, or is float32 beside bfloat16 where products read it so.
"""


def fused_cross_entropy(
    score: Score,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    max_logits: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of losses, each token's loss, and whether its most probable token was right."""
    hidden, weight = _detach_unneeded(hidden, weight)
    return _CrossEntropy.apply(score, hidden, weight, targets, token_weights, max_logits)


def recomputed_logprobs(
    score: Score,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    max_logits: int | None,
) -> Tensor:
    """Log-probability of each target."""
    hidden, weight = _detach_unneeded(hidden, weight)
    return _TokenLogprobs.apply(score, hidden, weight, targets, 1 / temperature, max_logits)


def _detach_unneeded(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Detach operands that need no gradient. Inside a Function, grad mode is always off."""
    return (hidden, weight) if torch.is_grad_enabled() else (hidden.detach(), weight.detach())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        score: Score,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        max_logits: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        weights = token_weights if needs_hidden or needs_weight else None
        request = Request(weights, needs_hidden, needs_weight, 1.0, max_logits)
        scored = score(hidden, _operand(weight, hidden), targets, request)
        ctx.save_for_backward(scored.d_hidden, scored.d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(scored.losses, scored.correct)
        return torch.dot(scored.losses, token_weights), scored.losses, scored.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        # Usually the loss itself is differentiated; its gradient is then 1.
        if not grad.is_cpu or grad != 1:
            d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
            d_weight = None if d_weight is None else d_weight * grad
        return None, d_hidden, _in_dtype(d_weight, ctx.weight_dtype), None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        score: Score,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        max_logits: int | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.score, ctx.scale, ctx.max_logits = score, scale, max_logits
        request = Request(None, False, False, scale, max_logits)
        return -score(hidden, _operand(weight, hidden), targets, request).losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        _, needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        request = Request(-grad * ctx.scale, needs_hidden, needs_weight, ctx.scale, ctx.max_logits)
        scored = ctx.score(hidden, _operand(weight, hidden), targets, request)
        return None, scored.d_hidden, _in_dtype(scored.d_weight, weight.dtype), None, None, None


def _operand(weight: Tensor, hidden: Tensor) -> Tensor:
    return weight if is_read_wide(weight, hidden) else weight.to(hidden.dtype)


def _in_dtype(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
