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

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from nemotron3.errors import OperandError
from nemotron3.ops.backends import Backend, resolve
from nemotron3.ops.checks import check_operand, check_quantizable
from nemotron3.ops.minifloat import E2M1, E4M3, decode, nearest, stochastic
from nemotron3.ops.nvfp4.hadamard import hadamard
from nemotron3.ops.nvfp4.native import fake_ms_eden_native
from nemotron3.ops.nvfp4.reference import NAN_SCALE, Parts, largest_finite, of_tensor
from nemotron3.ops.nvfp4.tensor import BLOCK, NVFP4Tensor, pack
from nemotron3.ops.rounding.bits import sixteen_bits
from nemotron3.ops.rounding.noise import Noise, Placed, placed, uniform

Along = Literal["rows", "columns"]
"""The axis of groups: the last axis of a matrix, or the first."""

LARGEST_GROUP = 128
"""Numbers that are rotated together, at most."""
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
    size = _check_signs(signs)
    check_quantizable("ms_eden", x, ("d",), size)
    check_operand("ms_eden", "signs", signs, (size,), x, same_dtype=False)
    places = placed("ms_eden", "stochastic", noise, x)
    assert places is not None
    if amax is not None:
        check_operand("ms_eden", "amax", amax, (), x, same_dtype=False)
    flat = x.float().reshape(x.shape[:-1].numel(), x.shape[-1])
    codes, scales, tensor_scale = _quantized(flat, signs.float(), places, amax)
    return NVFP4Tensor(
        codes=codes.view(*x.shape[:-1], x.shape[-1] // 2),
        block_scales=scales.view(*x.shape[:-1], x.shape[-1] // BLOCK),
        tensor_scale=tensor_scale,
    )


def fake_ms_eden(
    x: Float[Tensor, "*batch row column"],
    kind: Along,
    rotation: Noise,
    noise: Noise,
    *,
    amax: Float32[Tensor, "*batch"] | None = None,
    backend: Backend = "auto",
) -> Float32[Tensor, "*batch row column"]:
    """The values that `ms_eden` would keep of each matrix, in float32 and without packing them.

    `kind` is "rows", or "columns" for groups along columns: the transposed matrix's values, in the
    shape of `x`. Groups are as large as divides the axis; their signs are those of `rotation`
    (`random_signs`). The rows of `noise` are those of the matrix that has the groups along its
    rows. The matrices of a batch have a tensor scale each, and all of them the same noise.
    """
    if kind not in get_args(Along):
        raise ValueError(f"ms_eden: kind is {kind!r}; choose from {', '.join(get_args(Along))}")
    check_quantizable("ms_eden", x, ("d",), BLOCK, batch_dims=1)
    if kind == "columns":
        check_quantizable("ms_eden", x, ("rows", "d"), BLOCK)
    batch = x.shape[:-2]
    if amax is not None:
        check_operand("ms_eden", "amax", amax, batch, x, same_dtype=False)
        amax = amax.float().flatten().contiguous()
    if not x.numel():
        return x.float()
    wide = x.float().contiguous().view(batch.numel(), *x.shape[-2:])
    places = placed("ms_eden", "stochastic", noise, wide[0].T if kind == "columns" else wide[0])
    quantizer = resolve("ms_eden", backend, _FAKE, wide)
    return quantizer(wide, kind, rotation, places, amax).view(x.shape)


def fake_ms_eden_reference(
    x: Float32[Tensor, "batch row column"],
    kind: Along,
    rotation: Noise,
    noise: Placed,
    amax: Float32[Tensor, " batch"] | None,
) -> Float32[Tensor, "batch row column"]:
    """Shapes as in `fake_ms_eden`, of one batch axis."""
    turned = x.mT.contiguous() if kind == "columns" else x
    signs = random_signs(rotation, group_of(turned.shape[-1]), x.device)
    given = [None] * len(x) if amax is None else amax
    parts = [
        _quantized(matrix, signs, noise, own) for matrix, own in zip(turned, given, strict=True)
    ]
    values = torch.stack([NVFP4Tensor(*part).dequantize() for part in parts])
    return values.mT.contiguous() if kind == "columns" else values


def group_of(axis: int) -> int:
    """The largest size of groups that divides an axis of whole blocks."""
    return math.gcd(axis, LARGEST_GROUP)


_FAKE = {
    "reference": fake_ms_eden_reference,
    "torch": fake_ms_eden_reference,
    "native": fake_ms_eden_native,
}


def _quantized(
    x: Float32[Tensor, "row d"], signs: Tensor, noise: Placed, amax: Tensor | None
) -> Parts:
    size = len(signs)
    rotated = hadamard(x, signs)
    if amax is None:
        amax = largest_finite(rotated.unsqueeze(0))[0]
    blocks = rotated.unflatten(-1, (-1, BLOCK))
    is_finite = (blocks.abs() < torch.inf).all(-1, keepdim=True)
    blocks = torch.where(is_finite, blocks, 0.0)
    encode, tensor_scale = of_tensor(amax.float(), RANGE * LARGEST_SCALE)
    own = blocks.abs().amax(-1, keepdim=True)
    scales = decode(nearest(own * (encode / torch.full_like(encode, RANGE)), E4M3), E4M3)
    factor = torch.where(scales > 0, encode / scales, 0.0)
    codes = nearest(blocks * factor, E2M1)

    # In float64: squares of very small and very large numbers are outside float32.
    y, q = (
        t.double().unflatten(1, (-1, size // BLOCK)) for t in (blocks, decode(codes, E2M1) * scales)
    )
    along = _sum_of_group(y * q)
    c = torch.where(along > 0, _sum_of_group(y.square()) * encode.double() / along, 1.0).float()
    wanted = scales.squeeze(-1) * c.repeat_interleave(size // BLOCK, 1)
    noise = noise._replace(first_column=noise.first_column // BLOCK)
    drawn = stochastic(wanted, E4M3, uniform(wanted.shape, noise))
    drawn = torch.where(is_finite.squeeze(-1), drawn, NAN_SCALE).to(torch.uint8)
    return Parts(pack(codes.view(x.shape)), drawn.view(torch.float8_e4m3fn), tensor_scale)


def _sum_of_group(x: Float64[Tensor, "row group block element"]) -> Float64[Tensor, "row group"]:
    """The sum over a group: over blocks one after another, then over elements half onto half, which
    fixes its roundings."""
    total = x[..., 0, :]
    for block in range(1, x.shape[-2]):
        total = total + x[..., block, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total.squeeze(-1)


def _check_signs(signs: Tensor) -> int:
    """The size of groups."""
    if signs.dim() != 1 or signs.numel() not in (16, 32, 64, 128):
        raise OperandError(
            f"ms_eden: signs has shape {list(signs.shape)}; expected [16], [32], [64] or [128]"
        )
    return signs.numel()
