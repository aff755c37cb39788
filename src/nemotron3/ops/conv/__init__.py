"""Causal depthwise convolution with SiLU."""

from nemotron3.ops.conv.api import causal_conv

__all__ = ["causal_conv"]
