"""Cross-entropy over chunks of tokens with compiled products and softmax (see torch.py)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron3.ops.cross_entropy.torch import CACHED_LOGITS
from nemotron3.ops.linear.native import input_gradient, product, weight_gradient
from nemotron3.ops.native import NativeFunction

_rows = NativeFunction(Path(__file__).with_name("native.cpp"), "cross_entropy_rows", "ppppp ii")


def linear_cross_entropy_native(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, max_logits: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of losses, each token's loss, and whether its best guess was right."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    matrix, max_logits = weight.to(hidden.dtype).contiguous(), max_logits or CACHED_LOGITS
    return _LinearCrossEntropy.apply(hidden, matrix, targets, token_weights.float(), max_logits)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        max_logits: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden, targets = hidden.contiguous(), targets.contiguous()
        token_weights = token_weights.contiguous()
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = None if len(hidden) or not needs_weight else torch.zeros_like(weight)
        losses = hidden.new_empty(len(hidden))
        correct = torch.empty(len(hidden), dtype=torch.bool)
        chunk = max(1, min(max_logits // weight.shape[0], len(hidden)))
        room = hidden.new_empty(chunk, weight.shape[0])
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = product(hidden[rows], weight, into=room[: len(hidden) - start])
            wanted = token_weights[rows] if needs_hidden or needs_weight else None
            _rows(logits, targets[rows], wanted, losses[rows], correct[rows], *logits.shape)
            if d_hidden is not None:
                input_gradient(logits, weight=weight, into=d_hidden[rows])
            if needs_weight:
                d_weight = weight_gradient(logits, x=hidden[rows], add_to=d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(losses, correct)
        return torch.dot(losses, token_weights), losses, correct

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # A loss is most often differentiated itself, and then there is nothing to multiply by.
        d_hidden, d_weight = (d if d is None or grad == 1 else d * grad for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None
