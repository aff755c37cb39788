"""MS-EDEN: rounding to NVFP4 that is right on the average at half the error of stochastic rounding.

Stochastic rounding adds noise to every element. MS-EDEN (Quartet II, arXiv 2601.22813) rounds
elements to the nearest and takes the randomness elsewhere. It rotates each group of d numbers by a
random Hadamard transform, rounds them, and multiplies the group by

    c = <y, y> / <y, q>,

of the rotated numbers y and the rounded ones q. Over random rotations the result is `x` on the
average (EDEN, Vargaftik et al., ICML 2022). The factor goes into the block scales, which are
rounded stochastically to E4M3: one random number for 16 elements.

The result is in the rotated basis. A product is right if both operands are rotated with the same
signs along the axis of its sum, and the signs are drawn anew in every step.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.errors import OperandError
from nemotron3.ops.checks import check_operand, check_quantizable
from nemotron3.ops.minifloat import E2M1, E4M3, decode, nearest, stochastic
from nemotron3.ops.nvfp4.hadamard import hadamard
from nemotron3.ops.nvfp4.reference import NAN_SCALE, largest_finite, of_tensor
from nemotron3.ops.nvfp4.tensor import BLOCK, NVFP4Tensor, pack
from nemotron3.ops.rounding.bits import sixteen_bits
from nemotron3.ops.rounding.noise import Noise, placed, uniform

LARGEST_SCALE = 255.99
"""The largest block scale before the factor, which leaves it room up to 448."""
RANGE = 6.0 / (17 / 16 * 0.93)
"""What a block's largest number is mapped to: Quartet II's, a little beyond 6."""


def random_signs(noise: Noise, size: int, device: torch.device) -> Float32[Tensor, " {size}"]:
    """Random signs of the transform, a function of the noise's seed, step, layer and role."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return 1.0 - 2.0 * (sixteen_bits(size, zero, noise.bits)[0] & 1)


def ms_eden(
    x: Float[Tensor, "*axes d"],
    signs: Float32[Tensor, " group"],
    noise: Noise,
    *,
    amax: Float32[Tensor, ""] | None = None,
) -> NVFP4Tensor:
    """Quantize `x`, rotated along the last axis in groups of as many numbers as there are signs.

    The groups are of 16, 32, 64 or 128 numbers; the larger, the smaller the bias that remains.
    `amax` is that of the rotated numbers, where it is not that of `x` alone. NaN and infinities
    make their group NaN.
    """
    size = signs.numel()
    if signs.dim() != 1 or size not in (16, 32, 64, 128):
        raise OperandError(
            f"ms_eden: signs has shape {list(signs.shape)}; expected [16], [32], [64] or [128]"
        )
    check_quantizable("ms_eden", x, ("d",), size)
    check_operand("ms_eden", "signs", signs, (size,), x, same_dtype=False)
    places = placed("ms_eden", "stochastic", noise, x)
    assert places is not None
    rotated = hadamard(x.float(), signs.float()).view(x.shape[:-1].numel(), x.shape[-1])
    if amax is None:
        amax = largest_finite(rotated.unsqueeze(0))[0]
    else:
        check_operand("ms_eden", "amax", amax, (), x, same_dtype=False)

    blocks = rotated.unflatten(-1, (-1, BLOCK))
    is_finite = (rotated.abs() < torch.inf).view(blocks.shape).all(-1, keepdim=True)
    blocks = torch.where(is_finite, blocks, 0.0)
    encode, tensor_scale = of_tensor(amax.float(), RANGE * LARGEST_SCALE)
    own = blocks.abs().amax(-1, keepdim=True)
    scales = decode(nearest(own * (encode / RANGE), E4M3), E4M3)
    factor = torch.where(scales > 0, encode / scales, 0.0)
    codes = nearest(blocks * factor, E2M1)

    # In float64: squares of very small and very large numbers are outside float32.
    y = (blocks.double() * encode.double()).view(len(rotated), x.shape[-1] // size, size)
    q = (decode(codes, E2M1) * scales).double().view(y.shape)
    along = (y * q).sum(-1)
    c = torch.where(along > 0, y.square().sum(-1) / along, 1.0).float()
    wanted = scales.squeeze(-1) * c.repeat_interleave(size // BLOCK, 1)
    places = places._replace(first_column=places.first_column // BLOCK)
    scales = stochastic(wanted, E4M3, uniform(wanted.shape, places))
    scales = torch.where(is_finite.squeeze(-1), scales, NAN_SCALE).to(torch.uint8)
    return NVFP4Tensor(
        codes=pack(codes.view(x.shape)),
        block_scales=scales.view(torch.float8_e4m3fn).view(*x.shape[:-1], x.shape[-1] // BLOCK),
        tensor_scale=tensor_scale,
    )
