"""Products whose operands are rounded to a few bits: which operand in which format, as data."""

from nemotron3.ops.low_precision.operand import OperandFormat, padded
from nemotron3.ops.low_precision.product import (
    ExpertsQuantization,
    FlushedValues,
    Operands,
    Product,
    ProductFormats,
    ProductQuantization,
    RoundingPosition,
)

__all__ = [
    "ExpertsQuantization",
    "FlushedValues",
    "OperandFormat",
    "Operands",
    "Product",
    "ProductFormats",
    "ProductQuantization",
    "RoundingPosition",
    "padded",
]
