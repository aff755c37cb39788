"""Stochastic rounding of recurrent states to float16 and to int8 blocks."""

from nemotron3.ops.rounding.api import from_int8, to_float16, to_int8
from nemotron3.ops.rounding.bits import BLOCK, RandomBits

__all__ = ["BLOCK", "RandomBits", "from_int8", "to_float16", "to_int8"]
