"""Block scales with the smallest squared error.

The scale that maps a block's largest number to 6 is seldom the one with which all 16 are rounded
best. This tries the scales around it, from half to 1.6 times as large, and keeps for each block the
one with the smallest sum of squared errors: what ModelOpt calls MSE calibration, and what Super's
report takes for weights. A smaller scale clips the largest numbers and rounds the others better.

The tensor scale is that of the plain scales, and these are among those tried, so no block has a
larger error than with them. Every E4M3 number in the range is tried, not a grid of factors.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from nemotron3.ops.minifloat import E2M1, E4M3, decode, nearest
from nemotron3.ops.nvfp4.reference import (
    LARGEST,
    NAN_SCALE,
    SIXTH,
    Parts,
    largest_finite,
    of_tensor,
)
from nemotron3.ops.nvfp4.tensor import BLOCK, pack

_BELOW, _ABOVE = 8, 6
"""Neighbours that are tried: E4M3 has eight numbers in each factor of two."""
_LARGEST_CODE = 0x7E


def mse(x: Float32[Tensor, "batch row column"], amax: Float32[Tensor, " batch"] | None) -> Parts:
    """Shapes as in `nemotron3.ops.nvfp4.reference.quantize_reference`, for 1-D blocks."""
    amax = largest_finite(x) if amax is None else amax
    blocks = x.unflatten(-1, (-1, BLOCK))
    block_amax = blocks.abs().amax(-1, keepdim=True)
    is_finite = block_amax < torch.inf
    blocks = torch.where(is_finite, blocks, 0.0)
    encode, tensor_scale = of_tensor(amax)
    encode = encode.view(-1, 1, 1, 1)
    plain = nearest((block_amax * (encode * SIXTH)).nan_to_num(0.0).clamp(max=448.0), E4M3).int()
    scales, codes, least = plain, torch.zeros_like(blocks, dtype=torch.uint8), None
    for step in (0, *(s for s in range(-_BELOW, _ABOVE + 1) if s)):
        tried = (plain + step).clamp(0, _LARGEST_CODE)
        own, error = _rounded(blocks, tried.to(torch.uint8), encode)
        if least is None:
            codes, least = own, error
            continue
        is_better = error < least
        codes = torch.where(is_better, own, codes)
        scales, least = torch.where(is_better, tried, scales), torch.minimum(error, least)
    scales = torch.where(is_finite, scales, NAN_SCALE).to(torch.uint8).squeeze(-1)
    return Parts(pack(codes.view(x.shape)), scales.view(torch.float8_e4m3fn), tensor_scale)


def _rounded(blocks: Tensor, scales: Tensor, encode: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and the squared error of each block in units of the tensor scale."""
    decoded = decode(scales, E4M3)
    factor = (1 / (decoded * (1 / encode))).clamp(max=LARGEST)
    codes = nearest((blocks * factor).nan_to_num(0.0).clamp(-6.0, 6.0), E2M1)
    errors = (decode(codes, E2M1) * decoded - blocks * encode).square()
    total = torch.zeros_like(decoded)
    for i in range(BLOCK):  # one after another, which fixes the roundings of the sum
        total = total + errors[..., i : i + 1]
    return codes, total
