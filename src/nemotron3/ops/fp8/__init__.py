"""FP8 with one scale for a tensor."""

from nemotron3.ops.fp8.api import quantize
from nemotron3.ops.fp8.elements import Element
from nemotron3.ops.fp8.tensor import FP8Tensor

__all__ = ["Element", "FP8Tensor", "quantize"]
