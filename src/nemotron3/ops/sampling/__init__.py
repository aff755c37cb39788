"""Sampling from a softmax, with noise that is a function of the place where it is used."""

from nemotron3.ops.sampling.api import gumbel_argmax

__all__ = ["gumbel_argmax"]
