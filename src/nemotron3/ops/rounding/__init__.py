"""Stochastic rounding of recurrent states to float16 and to int8 blocks, and noise for it."""

from nemotron3.ops.rounding.api import from_int8, to_float16, to_int8
from nemotron3.ops.rounding.bits import BLOCK, RandomBits
from nemotron3.ops.rounding.noise import Noise, Rounding

__all__ = ["BLOCK", "Noise", "RandomBits", "Rounding", "from_int8", "to_float16", "to_int8"]
