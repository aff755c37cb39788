"""Cross-entropy of a linear output layer with all logits at once."""

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
    """Weighted sum of losses, each token's loss, and whether its best guess was right."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * token_weights).sum(), losses.detach(), logits.argmax(-1) == targets
