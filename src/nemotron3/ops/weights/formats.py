"""The number formats of weights, by name."""

from typing import Literal

from nemotron3.ops.weights.fp8 import FP8Weight
from nemotron3.ops.weights.int8 import Int8Weight
from nemotron3.ops.weights.nvfp4 import NVFP4Weight
from nemotron3.ops.weights.quantized import QuantizedWeight

WeightFormat = Literal["int8", "fp8", "nvfp4"]
FORMATS: dict[str, type[QuantizedWeight]] = {
    kind.format: kind for kind in (Int8Weight, FP8Weight, NVFP4Weight)
}
"""Every format by its name. To add one, write its class and kernels and add it here."""
