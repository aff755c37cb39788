"""Weights of products: plain tensors, narrower number formats, and weights that are computed."""

from nemotron3.ops.weights.computed import ComputedWeight
from nemotron3.ops.weights.expert_matrices import ExpertMatrices
from nemotron3.ops.weights.formats import FORMATS, WeightFormat, quantize_weight
from nemotron3.ops.weights.fp8 import FP8Weight
from nemotron3.ops.weights.int8 import Int8Weight
from nemotron3.ops.weights.integer import ActivationFormat, IntegerWeight
from nemotron3.ops.weights.low_rank import LowRankWeight, add_low_rank
from nemotron3.ops.weights.narrow import is_narrow, is_read_as_stored, is_read_wide
from nemotron3.ops.weights.nvfp4 import NVFP4Weight
from nemotron3.ops.weights.quantized import CompiledWeight, QuantizedWeight, Weight, dequantized

__all__ = [
    "FORMATS",
    "ActivationFormat",
    "CompiledWeight",
    "ComputedWeight",
    "ExpertMatrices",
    "FP8Weight",
    "Int8Weight",
    "IntegerWeight",
    "LowRankWeight",
    "NVFP4Weight",
    "QuantizedWeight",
    "Weight",
    "WeightFormat",
    "add_low_rank",
    "dequantized",
    "is_narrow",
    "is_read_as_stored",
    "is_read_wide",
    "quantize_weight",
]
