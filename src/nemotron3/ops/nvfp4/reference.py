"""The definition of NVFP4 quantization, in Transformer Engine's arithmetic.

One rounding for each operation, all in float32 (core_nvfp4.cuh and reference_nvfp4.py of
Transformer Engine):

    encode  = min(6 * 448 / amax, largest float32), and 1 if amax is 0
    scale_b = e4m3(min(amax_b * (encode * (1/6)), 448))
    factor  = min(1 / (scale_b * (1 / encode)), largest float32)
    element = e2m1(clamp(x * factor, -6, 6))

amax is the largest magnitude of the tensor, amax_b that of a block. Small blocks have subnormal
scales, and the smallest scale zero, which makes them zeros. Two things are our own:

* Stochastic rounding rounds scale_b up and not to nearest. Rounded down, it would clip the largest
  values of a block at 6, and rounded to zero it would lose the block, so the result would not be
  `x` on the average.
* NaN and infinity spoil their own block only: its scale is NaN, its codes are 0, and amax is that
  of the finite values.

The tensor scale is amax / (6 * 448). Where `encode` is at its limit (amax < 8e-36) it is 2^-128,
the inverse of the limit, with which codes and block scales were made.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.ops.minifloat import E2M1, E4M3, decode, nearest, stochastic, upward
from nemotron3.ops.nvfp4.hadamard import hadamard
from nemotron3.ops.nvfp4.tensor import BLOCK, pack
from nemotron3.ops.rounding.noise import Placed, uniform

LARGEST = torch.finfo(torch.float32).max
SIXTH = 0.1666666716337204
"""1/6 in float32."""
NAN_SCALE = 0x7F
LEAST_TENSOR_SCALE = 2.0**-128


Kind = Literal["rows", "tiles", "columns"]
"""Blocks of 16 in a row, of 16 x 16, of 16 in a column."""


class Transform(NamedTuple):
    """A Hadamard transform before quantizing, whose result is rounded to `dtype`."""

    signs: Tensor
    """float32 [16]."""
    dtype: torch.dtype


class Parts(NamedTuple):
    """Codes, one in a byte, and scales, in the shapes of `quantize_reference`."""

    codes: Tensor
    block_scales: Tensor
    tensor_scale: Tensor


def quantize_reference(
    x: Float[Tensor, "batch row column"],
    amax: Float32[Tensor, " batch"] | None,
    tile_rows: int,
    noise: Placed | None,
) -> Parts:
    """Packed codes [batch, row, column / 2], block scales [batch, row / tile_rows, column / 16].

    `tile_rows` is 1 for 1-D blocks and 16 for 2-D ones. Without `amax` it is that of `x`.
    """
    x = x.float()
    random = None if noise is None else uniform(x.shape, noise)
    parts = _quantized(x, largest_finite(x) if amax is None else amax, tile_rows, random)
    return parts._replace(codes=pack(parts.codes))


def fake_quantize_reference(
    x: Float[Tensor, "batch row column"],
    amax: Float32[Tensor, " batch"] | None,
    kind: Kind,
    noise: Placed | None,
    transform: Transform | None,
) -> Float32[Tensor, "batch row column"]:
    """The values of the quantized tensor; `transform` is for blocks along columns."""
    x = x.float()
    random = None if noise is None else uniform(x.shape, noise)
    if kind == "columns":
        x, random = x.mT, None if random is None else random.mT
    if transform is not None:
        x = hadamard(x, transform.signs).to(transform.dtype).float()
    parts = _quantized(
        x.contiguous(),
        largest_finite(x) if amax is None else amax,
        BLOCK if kind == "tiles" else 1,
        random,
    )
    units = parts.block_scales.float() * parts.tensor_scale.view(-1, 1, 1)
    units = units.repeat_interleave(BLOCK, -1)
    if kind == "tiles":
        units = units.repeat_interleave(BLOCK, -2)
    values = decode(parts.codes, E2M1) * units
    return values.mT.contiguous() if kind == "columns" else values


def _quantized(x: Tensor, amax: Tensor, tile_rows: int, random: Tensor | None) -> Parts:
    blocks = x.unflatten(1, (-1, tile_rows)).unflatten(-1, (-1, BLOCK))
    block_amax = blocks.abs().amax((2, 4), keepdim=True)  # batch tile 1 block 1
    is_finite = block_amax < torch.inf
    encode, tensor_scale = of_tensor(amax)
    encode = encode.view(-1, 1, 1, 1, 1)
    wanted = (block_amax * (encode * SIXTH)).clamp(max=448.0)
    scales = nearest(wanted, E4M3) if random is None else upward(wanted, E4M3)
    decoded = decode(scales, E4M3) * (1 / encode)
    factor = (1 / decoded).clamp(max=LARGEST)
    scaled = torch.where(is_finite, blocks * factor, 0.0).clamp(-6.0, 6.0).view(x.shape)
    codes = nearest(scaled, E2M1) if random is None else stochastic(scaled, E2M1, random)
    scales = torch.where(is_finite, scales, NAN_SCALE).to(torch.uint8)
    return Parts(codes, scales[:, :, 0, :, 0].view(torch.float8_e4m3fn), tensor_scale)


def largest_finite(x: Float32[Tensor, "batch row column"]) -> Float32[Tensor, " batch"]:
    """The largest magnitude that is finite, 0 where there is none."""
    magnitude = x.abs()
    finite = torch.where(magnitude < torch.inf, magnitude, 0.0).flatten(1)
    return finite.amax(1) if finite.shape[1] else finite.new_zeros(len(x))


def of_tensor(
    amax: Float32[Tensor, "*batch"], largest: float = 6.0 * 448.0
) -> tuple[Tensor, Tensor]:
    """`encode` of the module's docstring, which maps `amax` to `largest`, and the tensor scale."""
    most = torch.full_like(amax, largest)  # PyTorch divides by a scalar through its reciprocal
    encode = (most / amax).clamp(max=LARGEST)
    scale = (amax / most).clamp(min=LEAST_TENSOR_SCALE)
    is_zero = amax == 0
    return torch.where(is_zero, 1.0, encode), torch.where(is_zero, 0.0, scale)
