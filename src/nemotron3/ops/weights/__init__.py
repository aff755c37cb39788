"""Weights of products: plain tensors, and those that are kept in a narrower number format."""

from typing import Literal

from nemotron3.ops.weights.base import QuantizedWeight, Weight, dequantized
from nemotron3.ops.weights.int8 import Int8Weight

WeightFormat = Literal["int8"]
FORMATS: dict[str, type[QuantizedWeight]] = {Int8Weight.format: Int8Weight}
"""Every format by its name. A further one is a class, its kernels, and its line here."""

__all__ = ["FORMATS", "Int8Weight", "QuantizedWeight", "Weight", "WeightFormat", "dequantized"]
