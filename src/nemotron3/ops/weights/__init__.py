"""Weights of products: plain tensors, and weights in a narrower number format."""

from nemotron3.ops.weights.formats import FORMATS, WeightFormat
from nemotron3.ops.weights.int8 import Int8Weight
from nemotron3.ops.weights.quantized import QuantizedWeight, Weight, dequantized

__all__ = ["FORMATS", "Int8Weight", "QuantizedWeight", "Weight", "WeightFormat", "dequantized"]
