"""The definition of stochastic rounding, on integers where that is clearer.

To float16: the lower 13 of float32's 23 mantissa bits are dropped. A random number below 2^13 is
added to them first, so that the probability of a carry equals the dropped fraction. Below 2^-14
float16 has a fixed step of 2^-24; there a random fraction is added to the value in steps before it
is rounded down.
To int8: a block's largest magnitude is 127 steps. A random fraction is added to each value in steps
before it is rounded down.

Values beyond float16's range become its largest number, as in the saturating conversions of
Transformer Engine and of processors: an infinite state would stay infinite, a large one decays. NaN
stays NaN.
"""

import torch
from jaxtyping import Float, Float16, Float32, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.rounding.bits import BLOCK, RandomBits, sixteen_bits

LARGEST = 0x7BFF
"""Bits of 65504, above which float16 has only infinity."""
_INFINITY = 0x7F800000
_NORMAL = 0x38800000  # 2^-14
_REBIAS = (127 - 15) << 23
_SMALLEST_BLOCK = 2.0**-100
"""Blocks whose largest magnitude is below this become zero: 127 divided by it could overflow."""


def to_float16_reference(
    x: Float32[Tensor, "row element"], positions: Int[Tensor, " row"], bits: RandomBits
) -> Float16[Tensor, "row element"]:
    """Shapes as in `nemotron3.ops.rounding.api.to_float16`."""
    random = (sixteen_bits(x.shape[1], positions, bits) & 0x1FFF).int()
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    normal = (magnitude - _REBIAS + random) >> 13
    steps = (x.abs() * 2.0**24 + random * 2.0**-13).clamp(max=2.0**11).int()
    half = torch.where(magnitude < _NORMAL, steps, normal).clamp(max=LARGEST)
    half = torch.where(magnitude > _INFINITY, LARGEST + 0x0201, half)
    sign = (x.view(torch.int32) >> 16) & 0x8000
    return (half | sign).to(torch.int16).view(torch.float16)


def to_int8_reference(
    x: Float32[Tensor, "row unit d_state"], positions: Int[Tensor, " row"], bits: RandomBits
) -> tuple[Int8[Tensor, "row unit d_state"], Float32[Tensor, "row unit block"]]:
    """Shapes as in `nemotron3.ops.rounding.api.to_int8`."""
    random = sixteen_bits(x[0].numel(), positions, bits).float() * 2.0**-16
    scale, inverse = scales(x)
    steps = torch.floor(x * spread(inverse, x.shape[-1]) + random.view(x.shape))
    return steps.nan_to_num(0.0).clamp(-127, 127).to(torch.int8), scale


def scales(x: Float[Tensor, "*row d_state"]) -> tuple[Tensor, Tensor]:
    """The step of each block of the last axis, and its inverse."""
    padded = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = padded.abs().amax(-1)
    is_zero = largest < _SMALLEST_BLOCK
    most = torch.full_like(largest, 127.0)  # PyTorch divides by a scalar through its reciprocal
    return torch.where(is_zero, 0.0, largest / most), torch.where(is_zero, 0.0, most / largest)


def spread(of_blocks: Tensor, d_state: int) -> Tensor:
    """Repeat each block's number for all elements of the block."""
    return of_blocks.repeat_interleave(BLOCK, dim=-1)[..., :d_state]
