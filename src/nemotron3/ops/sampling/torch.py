"""Sampling that computes exact noise only for the tokens that can still win, and scores."""

import torch
from torch import Tensor

from nemotron3.ops.sampling.noise import ROUNDING, gumbel, gumbel_bound

_MANY = 2**13
"""From this number of tokens on, finding those that can win pays off."""


def gumbel_argmax_torch(logits: Tensor, keys: Tensor) -> Tensor:
    """Shapes as in `nemotron3.ops.sampling.api.gumbel_argmax`."""
    contenders = logits > -torch.inf
    if contenders.sum() > _MANY:
        contenders = _likely(logits, keys)
    rows, tokens = contenders.nonzero(as_tuple=True)
    scores = logits[rows, tokens].double() + gumbel(keys[rows], tokens)
    best = scores.new_full((len(keys),), -torch.inf).scatter_reduce(0, rows, scores, "amax")
    wins = scores == best[rows]
    result = torch.full_like(keys, -1)
    result[rows[wins]] = tokens[wins]
    return result.masked_fill(~(logits.amax(-1) > -torch.inf), -1)  # amax is NaN if any is


def _likely(logits: Tensor, keys: Tensor) -> Tensor:
    """A mask of tokens that may have the best score of their row; it contains the best one."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    logits = logits - logits.amax(-1, keepdim=True)
    bound = gumbel_bound(keys[:, None], tokens).add_(logits)
    one = bound.argmax(-1, keepdim=True)
    reached = logits.gather(-1, one).double() + gumbel(keys[:, None], one)
    return bound >= reached - ROUNDING


def logprobs_and_ranks_torch(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.sampling.api.logprobs_and_ranks`."""
    chosen = logits.gather(-1, tokens[:, None])
    logprobs = chosen.float().squeeze(-1) - logits.float().logsumexp(-1)
    return logprobs, (logits >= chosen).sum(-1)
