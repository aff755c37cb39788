"""Sampling and scoring by their definitions, with noise for every token."""

import torch
from torch import Tensor

from nemotron3.ops.sampling.noise import gumbel


def gumbel_argmax_reference(logits: Tensor, keys: Tensor) -> Tensor:
    """Shapes as in `nemotron3.ops.sampling.api.gumbel_argmax`."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    best = (logits.double() + gumbel(keys[:, None], tokens)).argmax(-1)
    return best.masked_fill(~(logits.amax(-1) > -torch.inf), -1)  # amax is NaN if any is


def logprobs_and_ranks_reference(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.sampling.api.logprobs_and_ranks`."""
    chosen = logits.gather(-1, tokens[:, None])
    logprobs = logits.double().log_softmax(-1).gather(-1, tokens[:, None])
    return logprobs.squeeze(-1).float(), (logits >= chosen).sum(-1)
