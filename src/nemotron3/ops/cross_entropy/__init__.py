"""Losses and log-probabilities of a linear output layer, without the matrix of logits."""

from nemotron3.ops.cross_entropy.api import (
    TokenDivergences,
    TokenLosses,
    linear_cross_entropy,
    linear_kl_divergence,
    token_logprobs,
)

__all__ = [
    "TokenDivergences",
    "TokenLosses",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "token_logprobs",
]
