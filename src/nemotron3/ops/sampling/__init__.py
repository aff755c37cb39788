"""Draws from a softmax whose noise is a function of where it is used."""

from nemotron3.ops.sampling.api import gumbel_argmax

__all__ = ["gumbel_argmax"]
