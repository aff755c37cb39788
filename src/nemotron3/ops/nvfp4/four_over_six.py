"""Block scales for a range of 4 or of 6, whichever has the smaller error.

E2M1 has nothing between 4 and 6, so numbers near 5/6 of a block's largest are rounded worst. With
the largest mapped to 4 instead, the elements are 0 to 4 with steps of 1 at most, and the block
scale is 1.5 times as large. Four-over-six (arXiv 2512.02010) quantizes each block both ways and
keeps the one with the smaller squared error. The arithmetic is Transformer Engine's, which differs
from that of the plain scales in two places: the tensor's largest block scale is 256, which leaves
room for 1.5 times as much, and a block's largest magnitude is divided by 6 first.

On squares of 16 x 16 it gains nothing, and with stochastic rounding there is nothing to choose.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from nemotron3.ops.minifloat import E2M1, E4M3, decode, nearest
from nemotron3.ops.nvfp4.reference import (
    LARGEST,
    NAN_SCALE,
    Parts,
    largest_finite,
    of_tensor,
)
from nemotron3.ops.nvfp4.tensor import BLOCK, NVFP4Tensor, pack

MOST = 6.0 * 256.0
"""What the tensor's largest magnitude is mapped to."""


def four_over_six(
    x: Float32[Tensor, "batch row column"], amax: Float32[Tensor, " batch"] | None
) -> Parts:
    """Shapes as in `nemotron3.ops.nvfp4.reference.quantize_reference`, for 1-D blocks."""
    amax = largest_finite(x) if amax is None else amax
    blocks = x.unflatten(-1, (-1, BLOCK))
    block_amax = blocks.abs().amax(-1, keepdim=True)
    is_finite = block_amax < torch.inf
    encode, tensor_scale = of_tensor(amax, MOST)
    encode = encode.view(-1, 1, 1, 1)
    base = block_amax / torch.full_like(block_amax, 6.0) * encode
    six, four = (_quantized(blocks, base * wider, encode, amax) for wider in (1.0, 1.5))
    codes, scales = (
        torch.where(four[2] < six[2], f, s) for f, s in zip(four[:2], six[:2], strict=True)
    )
    codes = torch.where(is_finite, codes, 0).to(torch.uint8).view(x.shape)
    scales = torch.where(is_finite, scales, NAN_SCALE).to(torch.uint8).squeeze(-1)
    return Parts(pack(codes), scales.view(torch.float8_e4m3fn), tensor_scale)


def fake_four_over_six(
    x: Float32[Tensor, "batch row column"], amax: Float32[Tensor, " batch"] | None
) -> Float32[Tensor, "batch row column"]:
    """The values of the quantized tensor."""
    return NVFP4Tensor(*four_over_six(x, amax)).dequantize()


def _quantized(
    blocks: Tensor, wanted: Tensor, encode: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, the scale's code, and the squared error of each block."""
    scales = nearest(wanted, E4M3)
    decoded = decode(scales, E4M3)
    factor = (1 / (decoded * (1 / encode))).clamp(max=LARGEST)
    codes = nearest((blocks * factor).nan_to_num(0.0).clamp(-6.0, 6.0), E2M1)
    amax = amax.view(-1, 1, 1, 1)
    most = torch.full_like(amax, MOST)
    errors = (decode(codes, E2M1) * decoded * amax / most - blocks).square()
    total = torch.zeros_like(decoded)
    for i in range(BLOCK):  # one after another, which fixes the roundings of the sum
        total = total + errors[..., i : i + 1]
    return codes, scales, total
