"""The number formats of weights, by name."""

from typing import Literal

from nemotron3.ops.weights.int8 import Int8Weight
from nemotron3.ops.weights.quantized import QuantizedWeight

WeightFormat = Literal["int8"]
FORMATS: dict[str, type[QuantizedWeight]] = {Int8Weight.format: Int8Weight}
"""Every format by its name. To add one, write its class and kernels and add a line here."""
