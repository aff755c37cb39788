"""The number formats of weights, by name."""

from typing import Literal

from torch import Tensor

from nemotron3.ops.nvfp4 import Scales
from nemotron3.ops.weights.fp8 import FP8Weight
from nemotron3.ops.weights.int8 import Int8Weight
from nemotron3.ops.weights.nvfp4 import NVFP4Weight
from nemotron3.ops.weights.quantized import QuantizedWeight

WeightFormat = Literal["int8", "fp8", "nvfp4"]
FORMATS: dict[str, type[QuantizedWeight]] = {
    kind.format: kind for kind in (Int8Weight, FP8Weight, NVFP4Weight)
}
"""Every format by its name. To add one, write its class and kernels and add it here."""


def quantize_weight(kind: str, values: Tensor, *, scales: Scales = "max") -> QuantizedWeight:
    """A matrix, or one for each expert, in a format; `scales` is how NVFP4 chooses block scales.

    Experts are quantized one after another: searching scales takes many copies of a matrix. Raises
    OperandError for values that are not finite.
    """
    with values.device:
        weight = FORMATS[kind].empty(values.shape)
    if isinstance(weight, NVFP4Weight):
        weight.scale_rule = scales
    if values.dim() == 2:
        return weight.copy_(values)
    for own, matrix in zip(weight, values, strict=True):
        own.copy_(matrix)
    return weight
