"""Stochastic rounding as Triton kernels.

Triton's own Philox equals the reference's, including the order of words and counters; only its seed
is one 64-bit number, with our stream in the upper half. A program of `to_float16` handles some
blocks of 128 elements as tiles of 16 lanes, one for each half of Philox's four words. A program of
`to_int8` handles a row of a state, whose elements may be in any blocks, and draws for each element
separately.
"""

# ruff: noqa: ANN001, ANN201, ANN202, PLR0913
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron3.ops.rounding.bits import BLOCK, RandomBits

_BLOCKS = 8
"""Blocks of 128 elements in a program."""


@triton.jit
def _half_of(x, random):
    """Bits of float16, from float32 and 16 random bits."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    random = (random & 0x1FFF).to(tl.int32)
    normal = (magnitude - (112 << 23) + random) >> 13
    small = tl.abs(x) * 16777216.0 + random.to(tl.float32) * 0.0001220703125
    steps = tl.where(small < 2048.0, small, 2048.0).to(tl.int32)
    half = tl.minimum(tl.where(magnitude < 0x38800000, steps, normal), 0x7BFF)
    half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
    return (half | ((bits >> 16) & 0x8000)).to(tl.int16)


@triton.jit
def _to_float16_kernel(x, positions, half, size, seed, BLOCKS: tl.constexpr, ROUNDS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, 16)
    counter = (block[:, None] * 16 + lane[None, :]).to(tl.uint32)
    zero = counter * 0
    position = zero + tl.load(positions + row).to(tl.uint32)
    words = tl.philox(seed, counter, zero, position, zero, ROUNDS)
    for w in tl.static_range(4):
        for upper in tl.static_range(2):
            element = block[:, None] * 128 + (2 * w + upper) * 16 + lane[None, :]
            exists = element < size
            value = tl.load(x + row * size + element, mask=exists, other=0.0)
            random = (words[w] >> (16 * upper)) & 0xFFFF
            tl.store(half + row * size + element, _half_of(value, random), mask=exists)


@triton.jit
def bits_of_elements(element, position, seed, ROUNDS: tl.constexpr):
    """16 bits for each element at its position; every element draws for itself."""
    counter = (element // 128 * 16 + element % 16).to(tl.uint32)
    zero = counter * 0
    position = zero + position.to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, zero, position, zero, ROUNDS)
    half = element // 16 % 8
    word = tl.where(half < 4, tl.where(half < 2, a, b), tl.where(half < 6, c, d))
    return (word >> (16 * (half % 2)).to(tl.uint32)) & 0xFFFF


@triton.jit
def _to_int8_kernel(
    x, positions, codes, steps, units, groups, D_STATE: tl.constexpr, seed, ROUNDS: tl.constexpr
):
    row = (tl.program_id(0) // units).to(tl.int64)
    unit = tl.program_id(0) % units
    n = tl.program_id(1) * 128 + tl.arange(0, 128)
    exists = n < D_STATE
    element = unit * D_STATE + n
    place = row * units * D_STATE + element
    value = tl.load(x + place, mask=exists, other=0.0)
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=0).to(tl.float32, bitcast=True)
    is_zero = largest < 7.888609052210118e-31  # 2^-100
    inverse = tl.where(is_zero, 0.0, tl.div_rn(127.0, largest))
    step = tl.where(is_zero, 0.0, tl.div_rn(largest, 127.0))
    tl.store(steps + tl.program_id(0) * groups + tl.program_id(1), step)

    random = bits_of_elements(element, tl.load(positions + row), seed, ROUNDS)
    number = tl.floor(value * inverse + random.to(tl.float32) * 0.0000152587890625)
    number = tl.where(number == number, number, 0.0)
    number = tl.where(number < 127.0, number, 127.0)
    number = tl.where(number > -127.0, number, -127.0)
    tl.store(codes + place, number.to(tl.int8), mask=exists)


def to_float16_triton(x: Tensor, positions: Tensor, bits: RandomBits) -> Tensor:
    """Shapes as in `nemotron3.ops.rounding.reference.to_float16_reference`."""
    rows, size = x.shape
    half = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    _to_float16_kernel[(triton.cdiv(size, BLOCK * _BLOCKS), rows)](
        x, positions, half.view(torch.int16), size, _seed(bits),
        BLOCKS=_BLOCKS, ROUNDS=bits.rounds,
    )  # fmt: skip
    return half


def to_int8_triton(x: Tensor, positions: Tensor, bits: RandomBits) -> tuple[Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.rounding.reference.to_int8_reference`."""
    rows, units, d_state = x.shape
    groups = triton.cdiv(d_state, BLOCK)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    steps = x.new_empty(rows, units, groups)
    _to_int8_kernel[(rows * units, groups)](
        x, positions, codes, steps, units, groups, d_state, _seed(bits), ROUNDS=bits.rounds,
        enable_fp_fusion=False,  # a fused multiply-add would round once, not twice
    )  # fmt: skip
    return codes, steps


def _seed(bits: RandomBits) -> int:
    return bits.seed | bits.stream << 32
