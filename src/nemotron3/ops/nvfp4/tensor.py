"""A tensor in NVFP4: four bits an element, and scales for blocks of 16 and for the whole.

    value = element * block_scale * tensor_scale

Elements are E2M1: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and their negatives. A block scale is E4M3, which
has three mantissa bits and reaches 448; the float32 tensor scale brings the largest block scale
there. Four and a half bits an element in total. A block is 16 elements along the last axis ("1d"),
or a square of 16 x 16 over the last two ("2d"), which is the same for the transposed matrix.

The parts are those of published checkpoints (ModelOpt): `codes` is `weight`, the even column in the
low half of a byte; `row_scales` is `weight_scale`; `tensor_scale` is `weight_scale_2`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from nemotron3.ops.minifloat import E2M1, decode

Block = Literal["1d", "2d"]
BLOCK = 16
"""Elements along an axis that share a scale."""


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """Codes and scales; `dequantize` gives the values."""

    codes: UInt8[Tensor, "*axes half"]
    """Two elements in a byte, the one of the even column in the low half."""
    block_scales: Tensor
    """float8_e4m3fn [*axes, d / 16]; of 2-D blocks [..., rows / 16, d / 16]."""
    tensor_scale: Float32[Tensor, "*batch"]
    """One number, or one for each matrix of a batch."""
    block: Block = "1d"

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.codes.nbytes + self.block_scales.nbytes + self.tensor_scale.nbytes

    @property
    def row_scales(self) -> Tensor:
        """Block scales with a row for every row of the matrix: float8_e4m3fn [*axes, d / 16]."""
        if self.block == "1d":
            return self.block_scales
        return self.block_scales.view(torch.uint8).repeat_interleave(BLOCK, -2).view(_E4M3)

    def elements(self) -> Float32[Tensor, "*axes d"]:
        """The elements before scaling."""
        return decode(unpack(self.codes), E2M1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32 as ModelOpt does, and then rounded to `dtype`.

        Two roundings: of the product of both scales, and of that with an element.
        """
        axes = self.codes.dim() - self.tensor_scale.dim()
        tensor_scale = self.tensor_scale.view(*self.tensor_scale.shape, *[1] * axes)
        scales = self.row_scales.float() * tensor_scale
        return (self.elements() * scales.repeat_interleave(BLOCK, -1)).to(dtype)


_E4M3 = torch.float8_e4m3fn


def pack(codes: UInt8[Tensor, "*axes d"]) -> UInt8[Tensor, "*axes half"]:
    """Two 4-bit codes in a byte, the one of the even column in the low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(packed: UInt8[Tensor, "*axes half"]) -> UInt8[Tensor, "*axes d"]:
    """The codes of `pack`, one in a byte."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)
