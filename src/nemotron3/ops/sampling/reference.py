"""A draw with noise for every token, as it is defined."""

import torch
from torch import Tensor

from nemotron3.ops.sampling.noise import gumbel


def gumbel_argmax_reference(logits: Tensor, keys: Tensor) -> Tensor:
    """Shapes as in `nemotron3.ops.sampling.api.gumbel_argmax`."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    best = (logits.double() + gumbel(keys[:, None], tokens)).argmax(-1)
    return best.masked_fill(~(logits.amax(-1) > -torch.inf), -1)  # NaN is the largest
