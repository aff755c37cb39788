"""Floating-point numbers of four and eight bits: their codes, and rounding to them.

A format has m mantissa bits and a least exponent. Between two powers of two its numbers are one
step of 2^(exponent - m) apart; below the least exponent the step stays, so that zero is reached
evenly (subnormal numbers). The code of a magnitude is its rank: codes of neighbours differ by one,
also across a power of two. The sign is the bit above. Formats and codes are those of the Open
Compute Project (OFP8, and Microscaling Formats v1.0); none of the roundings makes an infinity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Minifloat:
    """A number format of `bits` bits, of which one is the sign."""

    name: str
    bits: int
    mantissa_bits: int
    min_exponent: int
    largest: float
    nan: int | None
    """The code of NaN; None where there is none."""

    @property
    def sign(self) -> int:
        """The sign's bit."""
        return 1 << self.bits - 1


E2M1 = Minifloat("e2m1", 4, 1, 0, 6.0, None)
E4M3 = Minifloat("e4m3", 8, 3, -6, 448.0, 0x7F)
E5M2 = Minifloat("e5m2", 8, 2, -14, 57344.0, 0x7F)


def nearest(x: Float32[Tensor, "*shape"], to: Minifloat) -> UInt8[Tensor, "*shape"]:
    """Codes of the nearest numbers, ties to the even code; beyond the largest, the largest."""
    return _encode(x, to, torch.round)


def upward(x: Float32[Tensor, "*shape"], to: Minifloat) -> UInt8[Tensor, "*shape"]:
    """Codes of the next numbers away from zero; beyond the largest, the largest."""
    return _encode(x, to, torch.ceil)


def stochastic(
    x: Float32[Tensor, "*shape"], to: Minifloat, random: Float32[Tensor, "*shape"]
) -> UInt8[Tensor, "*shape"]:
    """Codes of one of the two neighbours, which is `x` on the average.

    `random` is uniform in (0, 1). A value is rounded away from zero with a probability equal to its
    fraction of a step, and not at all if it is a number of the format.
    """
    return _encode(x, to, lambda steps: torch.floor(steps + random))


def decode(codes: UInt8[Tensor, "*shape"], of: Minifloat) -> Float32[Tensor, "*shape"]:
    """The numbers that codes stand for."""
    return _values(of).to(codes.device)[codes.long()]


def _encode(x: Tensor, to: Minifloat, to_integer: Callable[[Tensor], Tensor]) -> Tensor:
    magnitude = x.abs().clamp(max=to.largest)
    exponent = (magnitude.view(torch.int32) >> 23) - 127
    exponent = exponent.clamp(min=to.min_exponent)
    steps = to_integer(torch.ldexp(magnitude, to.mantissa_bits - exponent))
    code = steps + (exponent - to.min_exponent << to.mantissa_bits)
    code = torch.where(x < 0, code + to.sign, code)  # a negative zero is zero
    return torch.where(x.isnan(), float(to.nan or 0), code).to(torch.uint8)


@cache
def _values(of: Minifloat) -> Tensor:
    magnitudes: list[float] = []
    for code in range(of.sign):
        exponent = max((code >> of.mantissa_bits) - 1, 0)
        steps = code - (exponent << of.mantissa_bits)
        value = math.ldexp(steps, exponent + of.min_exponent - of.mantissa_bits)
        magnitudes.append(value if value <= of.largest else math.nan)
    return torch.tensor(magnitudes + [-m for m in magnitudes])
