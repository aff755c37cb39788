"""Sampling from a softmax, with noise that is a function of request, position and token."""

from nemotron3.ops.sampling.api import gumbel_argmax, logprobs_and_ranks

__all__ = ["gumbel_argmax", "logprobs_and_ranks"]
