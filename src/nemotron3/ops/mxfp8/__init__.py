"""MXFP8: FP8 with a power of two as the scale of each 32 elements."""

from nemotron3.ops.mxfp8.api import fake_quantize, quantize
from nemotron3.ops.mxfp8.tensor import BLOCK, MXFP8Tensor

__all__ = ["BLOCK", "MXFP8Tensor", "fake_quantize", "quantize"]
