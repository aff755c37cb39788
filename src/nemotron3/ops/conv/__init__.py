"""Causal depthwise convolution with SiLU."""

from nemotron3.ops.conv.api import causal_conv, causal_conv_steps

__all__ = ["causal_conv", "causal_conv_steps"]
