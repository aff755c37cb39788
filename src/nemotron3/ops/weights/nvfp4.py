"""Weights in NVFP4: w[n, k] = tensor_scales[n] block_scales[n, k / 16] e2m1(codes[n, k]).

Four bits an element and one E4M3 scale for 16 inputs. A published matrix has one tensor scale, and
here each of its rows holds it: then some rows are a weight like any other, and matrices that are
stacked in one (gate and value of SwiGLU) keep the scales of their own. Products do not round their
activations, W4A16, unless they are asked to, W4A8 (integer.py); sums are float32.

The number of inputs must be divisible by 16.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron3.ops.nvfp4 import BLOCK, NVFP4Tensor, Scales, quantize
from nemotron3.ops.weights.integer import IntegerWeight, products_in
from nemotron3.ops.weights.quantized import (
    Weight,
    check_no_nan,
    finite_matrix,
    one_scale,
    scale_of_rows,
)

_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the number of each code, which is E2M1."""


class NVFP4Weight(IntegerWeight):
    """4-bit codes, an E4M3 scale per 16 inputs, and a float32 scale per matrix."""

    format = "nvfp4"
    block: ClassVar[int] = BLOCK

    codes: UInt8[Tensor, "*expert d_out half"]
    """Two elements in a byte, the one of the even input in the low half."""
    block_scales: Float[Tensor, "*expert d_out blocks"]
    """float8_e4m3fn."""
    tensor_scales: Float[Tensor, "*expert d_out"]

    def __init__(
        self,
        codes: Tensor,
        block_scales: Tensor,
        tensor_scales: Tensor,
        *,
        scale_rule: Scales = "max",
    ) -> None:
        """`scale_rule` is how `copy_` chooses the scales of plain values."""
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("block_scales", block_scales)
        self.register_buffer("tensor_scales", tensor_scales)
        self.scale_rule: Scales = scale_rule

    @classmethod
    def empty(cls, shape: torch.Size) -> Self:
        """An uninitialized weight of this shape, on PyTorch's default device."""
        cls.check_shape(shape)
        rows, inputs = shape[:-1], shape[-1]
        return cls(
            torch.empty(*rows, inputs // 2, dtype=torch.uint8),
            torch.empty(*rows, inputs // BLOCK, dtype=torch.float8_e4m3fn),
            torch.empty(rows),
        )

    @classmethod
    def over(cls, stored: Mapping[str, Tensor]) -> Self:
        """The weight of the stored `parts` of a matrix, in their memory but for scales of rows."""
        codes, block_scales = stored["weight"], stored["weight_scale"]
        weight = cls(codes, block_scales, torch.empty(codes.shape[:-1]))
        check_no_nan(weight, block_scales)
        weight.load_part("weight_scale_2", stored["weight_scale_2"])
        return weight

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized weight."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight, in the float32 arithmetic of `NVFP4Tensor.dequantize`."""
        flat = NVFP4Tensor(
            self.codes.flatten(0, -2),
            self.block_scales.flatten(0, -2),
            self.tensor_scales.flatten(),
        )
        return flat.dequantize(dtype).view(self.shape)

    def integers(self) -> tuple[Tensor, Tensor]:
        """Twice the elements, which are integers up to 12, and half of the blocks' scales."""
        twice = self.codes.new_tensor(_TWICE, dtype=torch.int8)
        pairs = torch.stack([self.codes & 15, self.codes >> 4], -1)
        scales = 0.5 * self.tensor_scales.unsqueeze(-1) * self.block_scales.float()
        return twice[pairs.flatten(-2).long()], scales

    @torch.no_grad()
    def copy_(self, values: Weight) -> Self:
        """Copy the values of a tensor, quantizing them, or of another weight of this format.

        Each matrix gets a tensor scale. Raises OperandError where a value is not finite.
        """
        if isinstance(values, NVFP4Weight):
            found = (values.codes, values.block_scales, values.tensor_scales)
        else:
            matrix = finite_matrix(self, values)
            made = quantize(matrix, scales=self.scale_rule, batch_dims=matrix.dim() - 2)
            found = (made.codes, made.block_scales, made.tensor_scale.unsqueeze(-1))
        for own, other in zip(self.buffers(), found, strict=True):
            own.copy_(other)
        return self

    def parts(self) -> dict[str, Tensor]:
        """ModelOpt's: packed codes, block scales, and the tensor scale."""
        return {
            "weight": self.codes,
            "weight_scale": self.block_scales,
            "weight_scale_2": one_scale(self.tensor_scales),
        }

    @torch.no_grad()
    def load_part(self, name: str, stored: Tensor) -> None:
        """Copy one of `parts` from a file."""
        if name == "weight_scale_2":
            self.tensor_scales.copy_(scale_of_rows(self, stored, self.tensor_scales))
        else:
            if name == "weight_scale":
                check_no_nan(self, stored)
            self.parts()[name].copy_(stored)

    def __getitem__(self, index: Any) -> Self:
        """A view of a part; `index` applies to the axes before the last."""
        parts = (part[index] for part in self.buffers())
        return products_in(type(self)(*parts, scale_rule=self.scale_rule), self.activations)
