"""A tensor in MXFP8: eight bits an element, and a power of two for each 32 along the last axis.

    value = element * block_scale

A block scale is E8M0: eight bits of exponent, 2^-127 to 2^127, and NaN. It is the Open Compute
Project's format (Microscaling Formats v1.0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
"""Elements along the last axis that share a scale."""

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class MXFP8Tensor:
    """Elements and block scales; `dequantize` gives the values."""

    codes: Tensor
    """float8_e4m3fn or float8_e5m2 [*axes, d]."""
    block_scales: Tensor
    """float8_e8m0fnu [*axes, d / 32]."""

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """The device of both parts."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.codes.nbytes + self.block_scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values in float32, then rounded to `dtype`.

        Exact, but for subnormal values and for 2^128, to which values near the end of float32's
        range may be rounded: it becomes float32's largest number.
        """
        values = self.codes.float() * powers(self.block_scales).repeat_interleave(BLOCK, -1)
        return values.clamp(-_LARGEST, _LARGEST).to(dtype)


def powers(scales: Tensor) -> Tensor:
    """Block scales in float32."""
    exponents = scales.view(torch.uint8).int()
    values = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 127)
    return torch.where(exponents == 255, torch.nan, values)
