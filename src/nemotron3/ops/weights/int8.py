"""Weights as 8-bit integers, with a scale for each output: w[n, k] = scales[n] codes[n, k].

Products do not round their activations unless they are asked to (integer.py), and sums are
float32. Codes are symmetric, -127 to 127, and a row's
scale is its largest magnitude divided by 127, so the error of an element is at most half a scale.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from nemotron3.ops.weights.integer import BLOCK, IntegerWeight, products_in
from nemotron3.ops.weights.quantized import Weight, finite_matrix

_MAX_CODE = 127


class Int8Weight(IntegerWeight):
    """8-bit codes and a float32 scale per output."""

    format = "int8"

    codes: Int8[Tensor, "*expert d_out d_in"]
    scales: Float[Tensor, "*expert d_out"]

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def empty(cls, shape: torch.Size) -> Self:
        """An uninitialized weight of this shape, on PyTorch's default device."""
        return cls(torch.empty(shape, dtype=torch.int8), torch.empty(shape[:-1]))

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """Quantize a matrix [out, in], or one for each expert, by rounding to nearest."""
        with weight.device:
            return cls.empty(weight.shape).copy_(weight)

    @classmethod
    def over(cls, stored: Mapping[str, Tensor]) -> Self:
        """The weight of the stored `parts` of a matrix, in their memory."""
        return cls(stored["weight"], stored["weight_scale"])

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized weight."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight, computed in float32 at least and then rounded to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(wide) * self.scales.to(wide).unsqueeze(-1)).to(dtype)

    def integers(self) -> tuple[Tensor, Tensor]:
        """The codes, and a row's scale for each of its blocks."""
        blocks = -(-self.codes.shape[-1] // BLOCK)
        return self.codes, self.scales.unsqueeze(-1).expand(*self.scales.shape, blocks)

    @torch.no_grad()
    def copy_(self, values: Weight) -> Self:
        """Copy the values of a tensor, quantizing them, or of another weight of this format.

        Raises OperandError where a value is not finite.
        """
        if isinstance(values, Int8Weight):
            self.codes.copy_(values.codes)
            self.scales.copy_(values.scales)
            return self
        matrix = finite_matrix(self, values)
        scales = matrix.abs().amax(-1) / _MAX_CODE
        steps = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
        self.codes.copy_((matrix / steps).round_().clamp_(-_MAX_CODE, _MAX_CODE))
        self.scales.copy_(scales)
        return self

    def parts(self) -> dict[str, Tensor]:
        """The codes and the scales."""
        return {"weight": self.codes, "weight_scale": self.scales}

    @torch.no_grad()
    def load_part(self, name: str, stored: Tensor) -> None:
        """Copy one of `parts` from a file."""
        self.parts()[name].copy_(stored)

    def __getitem__(self, index: Any) -> Self:
        """A view of a part; `index` applies to the axes before the last."""
        return products_in(type(self)(self.codes[index], self.scales[index]), self.activations)
