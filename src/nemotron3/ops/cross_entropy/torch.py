"""Losses of a linear output layer over chunks of tokens, with gradients in the same pass.

With a vocabulary of 131,072 the logits of one token take half a megabyte, so the whole matrix of
logits never exists: a chunk's logits are computed, turned into losses and then into gradients in
place, and freed (the idea of Liger Kernel's fused loss, arXiv 2410.10989).

The gradient of the output matrix is summed in float32 whatever the dtype of the products. In a
bfloat16 sum the small contributions of the MTP losses vanish, which is why Nemotron 3 Ultra
diverged at 8T tokens.
"""

from functools import partial

import torch
from torch import Tensor

from nemotron3.ops.cross_entropy.autograd import (
    Request,
    Scored,
    fused_cross_entropy,
    recomputed_logprobs,
)

CACHED_LOGITS = 1 << 22
"""Logits at a time by default: 16 MB in float32, so that they are still in a CPU's cache when they
are turned into gradients."""


def _score(hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> Scored:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if request.wants_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if request.wants_weight else None
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    chunk = max(1, (request.max_logits or CACHED_LOGITS) // len(weight))
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        h, target = hidden[rows], targets[rows].unsqueeze(1)
        logits = (h @ weight.T).to(wide)
        if request.scale != 1:
            logits *= request.scale
        log_normalizer = logits.logsumexp(-1, keepdim=True)
        losses[rows] = (log_normalizer - logits.gather(1, target)).squeeze(1)
        correct[rows] = logits.argmax(-1) == target.squeeze(1)
        if request.token_weights is None:
            continue
        probabilities = logits.sub_(log_normalizer).exp_()
        probabilities.scatter_add_(1, target, torch.full_like(log_normalizer, -1.0))
        token_weights = request.token_weights[rows].unsqueeze(1)
        d_logits = probabilities.mul_(token_weights).to(hidden.dtype)
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        if d_weight is not None:
            if wide == hidden.dtype:
                d_weight.addmm_(d_logits.T, h)
            else:
                d_weight += (d_logits.T @ h).to(wide)
    return Scored(losses, correct, d_hidden, d_weight)


def _score_divergence(
    teacher_weight: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, request: Request
) -> Scored:
    """The targets are distributions: those of the teacher's hidden states."""
    weight = weight.to(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    d_hidden = torch.empty_like(hidden) if request.wants_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if request.wants_weight else None
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    agrees = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    chunk = max(1, (request.max_logits or CACHED_LOGITS) // len(weight))
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        h = hidden[rows]
        own = (h @ weight.T).to(wide).log_softmax(-1)
        teacher = (teacher_hidden[rows] @ teacher_weight.T).to(wide).log_softmax(-1)
        agrees[rows] = own.argmax(-1) == teacher.argmax(-1)
        wanted = teacher.exp()
        losses[rows] = teacher.sub_(own).mul_(wanted).sum(-1)
        if request.token_weights is None:
            continue
        off = own.exp_().sub_(wanted).mul_(request.token_weights[rows].unsqueeze(1))
        d_logits = off.to(hidden.dtype)
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        if d_weight is not None:
            d_weight += (d_logits.T @ h).to(wide)
    return Scored(losses, agrees, d_hidden, d_weight)


def linear_kl_divergence_torch(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    max_logits: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, with at most `max_logits` logits of each model at a time."""
    score = partial(_score_divergence, teacher_weight)
    return fused_cross_entropy(score, hidden, weight, teacher_hidden, token_weights, max_logits)


linear_cross_entropy_torch = partial(fused_cross_entropy, _score)
token_logprobs_chunked = partial(recomputed_logprobs, _score)
