"""Cross-entropy and log-probabilities of a linear output layer, without the matrix of logits."""

from nemotron3.ops.cross_entropy.api import TokenLosses, linear_cross_entropy, token_logprobs

__all__ = ["TokenLosses", "linear_cross_entropy", "token_logprobs"]
