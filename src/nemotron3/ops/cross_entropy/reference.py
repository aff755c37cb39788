"""Losses of a linear output layer, computed from all logits at once."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    max_logits: int | None,  # noqa: ARG001 - the reference holds every logit; every backend is called alike
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of losses, each token's loss, and whether its most probable token was right."""
    logits = _logits(hidden, weight)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * token_weights).sum(), losses.detach(), logits.argmax(-1) == targets


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    max_logits: int | None,  # noqa: ARG001
) -> Tensor:
    """log softmax(hidden weight^T / temperature) at each target."""
    logprobs = F.log_softmax(_logits(hidden, weight) / temperature, dim=-1)
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)


def linear_kl_divergence_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    max_logits: int | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of divergences, each token's divergence, and whether both have one choice."""
    own = F.log_softmax(_logits(hidden, weight), dim=-1)
    teacher = F.log_softmax(_logits(teacher_hidden, teacher_weight), dim=-1)
    losses = (teacher.exp() * (teacher - own)).sum(-1)
    agrees = own.argmax(-1) == teacher.argmax(-1)
    return (losses * token_weights).sum(), losses.detach(), agrees


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.to(hidden.dtype).T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
