"""A tensor in FP8: eight bits an element, and one float32 scale.

    value = element * scale

The parts are those of published checkpoints (ModelOpt): `codes` is `weight`, `scale` is
`weight_scale`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FP8Tensor:
    """Elements and a scale; `dequantize` gives the values."""

    codes: Tensor
    """float8_e4m3fn or float8_e5m2 [*axes]."""
    scale: Float32[Tensor, "*batch"]
    """One number, or one for each matrix of a batch."""

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
        return self.codes.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32 with one rounding, and then rounded to `dtype`."""
        axes = self.codes.dim() - self.scale.dim()
        return (self.codes.float() * self.scale.view(*self.scale.shape, *[1] * axes)).to(dtype)
