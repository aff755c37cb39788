"""Weights in FP8: w[n, k] = scales[n] e4m3(codes[n, k]).

A published matrix has one scale, and here each of its rows holds it: then some rows are a weight
like any other, and matrices that are stacked in one (gate and value of SwiGLU) keep the scales of
their own. Activations are not quantized, and sums are float32.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.ops.fp8 import quantize
from nemotron3.ops.weights.quantized import (
    CompiledWeight,
    Weight,
    check_no_nan,
    finite_matrix,
    one_scale,
    scale_of_rows,
)


class FP8Weight(CompiledWeight):
    """E4M3 elements and a float32 scale per matrix."""

    format = "fp8"

    codes: Float[Tensor, "*expert d_out d_in"]
    """float8_e4m3fn."""
    scales: Float[Tensor, "*expert d_out"]

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def empty(cls, shape: torch.Size) -> Self:
        """An uninitialized weight of this shape, on PyTorch's default device."""
        return cls(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(shape[:-1]))

    @classmethod
    def over(cls, stored: Mapping[str, Tensor]) -> Self:
        """The weight of the stored `parts` of a matrix, in their memory but for scales of rows."""
        codes = stored["weight"]
        weight = cls(codes, torch.empty(codes.shape[:-1]))
        check_no_nan(weight, codes)
        weight.load_part("weight_scale", stored["weight_scale"])
        return weight

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized weight."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight, computed in float32 with one rounding, then in `dtype`."""
        return (self.codes.float() * self.scales.unsqueeze(-1)).to(dtype)

    @torch.no_grad()
    def copy_(self, values: Weight) -> Self:
        """Copy the values of a tensor, quantizing them, or of another weight of this format.

        Each matrix gets a scale. Raises OperandError where a value is not finite.
        """
        if isinstance(values, FP8Weight):
            self.codes.copy_(values.codes)
            self.scales.copy_(values.scales)
            return self
        matrix = finite_matrix(self, values)
        made = quantize(matrix, batch_dims=matrix.dim() - 2)
        self.codes.copy_(made.codes)
        self.scales.copy_(made.scale.unsqueeze(-1))
        return self

    def parts(self) -> dict[str, Tensor]:
        """ModelOpt's: the elements, and the scale."""
        return {"weight": self.codes, "weight_scale": one_scale(self.scales)}

    @torch.no_grad()
    def load_part(self, name: str, stored: Tensor) -> None:
        """Copy one of `parts` from a file."""
        if name == "weight":
            check_no_nan(self, stored)
            self.codes.copy_(stored)
        else:
            self.scales.copy_(scale_of_rows(self, stored, self.scales))

    def __getitem__(self, index: Any) -> Self:
        """A view of a part; `index` applies to the axes before the last."""
        return type(self)(self.codes[index], self.scales[index])
