"""Cross-entropy of a linear output layer over chunks of tokens, gradients made on the way.

At a vocabulary of 131,072 the logits of one token are half a megabyte, so the matrix of logits
never exists: a chunk's logits are made, turned into losses and at once into gradients, and dropped.
The loss is a weighted sum whose weights are known beforehand, so nothing of the backward pass needs
to wait, and the output product runs three times in all instead of the four that recomputation would
take (the idea of Liger Kernel's fused loss, arXiv 2410.10989).

The gradient of the output matrix is summed in float32 whatever the products run in: summed in
bfloat16, the small contributions of the MTP losses vanish, which is what made Nemotron 3 Ultra
diverge at 8T tokens.
"""

from typing import Any

import torch
from torch import Tensor

CACHED_LOGITS = 1 << 22
"""Logits at a time by default: 16 MB in float32, so that they are still in a CPU's cache when they
are turned into gradients."""


def linear_cross_entropy_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, max_logits: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of losses, each token's loss, and whether its best guess was right."""
    # Inside a Function gradients are always off, and what the inputs would need says nothing of
    # whether anyone asked; only here is that known.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    max_logits = max_logits or CACHED_LOGITS
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, max_logits)


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
        wide = torch.promote_types(hidden.dtype, torch.float32)
        product_weight = weight.to(hidden.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        chunk = max(1, max_logits // weight.shape[0])
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows], targets[rows].unsqueeze(1)
            logits = (h @ product_weight.T).to(wide)
            log_normalizer = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (log_normalizer - logits.gather(1, target)).squeeze(1)
            correct[rows] = logits.argmax(-1) == target.squeeze(1)
            if d_hidden is None and d_weight is None:
                continue
            probabilities = logits.sub_(log_normalizer).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(log_normalizer, -1.0))
            d_logits = probabilities.mul_(token_weights[rows].unsqueeze(1)).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, product_weight, out=d_hidden[rows])
            if d_weight is not None:
                if wide == hidden.dtype:
                    d_weight.addmm_(d_logits.T, h)
                else:
                    d_weight += (d_logits.T @ h).to(wide)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses, correct)
        total = torch.dot(losses, token_weights.to(wide))
        return total, losses, correct

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None
