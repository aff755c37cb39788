"""NVFP4 quantization as two Triton kernels: the largest magnitude, then scales and elements.

Each reads x once. Where there is a Hadamard transform, both compute it in registers, which costs
less than writing its result and reading it again. A program handles some groups of elements that
share a scale, and the three kinds of blocks differ only in where the elements of a group lie.

Scales and elements are rounded with integers and sums and never converted by the hardware or by
Triton: the conversions of some of its versions lose a carry, and older GPUs have none. An element
draws its random bits by itself, which is more work than for eight at once, and needs no order.
"""

# ruff: noqa: ANN001, ANN202, PLR0913
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron3.ops.nvfp4.reference import Kind, Parts, Transform, of_tensor
from nemotron3.ops.nvfp4.tensor import BLOCK
from nemotron3.ops.rounding.noise import ROUNDS, Placed
from nemotron3.ops.rounding.triton import bits_of_elements

_ELEMENTS = 2048
"""Elements of a program."""
_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _magnitude(x):
    """As integers, which have the order of the numbers, and NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _places(groups, d, KIND: tl.constexpr, SIZE: tl.constexpr):
    """The first row of each group, and row and column of each element."""
    s = tl.arange(0, SIZE)[None, :]
    if KIND == "columns":
        first, start = groups // d * 16, groups % d
        return first, first[:, None] + s, start[:, None] + s * 0
    first, start = groups // (d // 16), groups % (d // 16) * 16
    if KIND == "tiles":
        first *= 16
    return first, first[:, None] + s // 16, start[:, None] + s % 16


@triton.jit
def _sums_and_differences(y, DISTANCE: tl.constexpr, GROUPS: tl.constexpr):
    """One round of the transform: of the pairs that are so far apart."""
    pairs = tl.reshape(y, (GROUPS, 8 // DISTANCE, 2, DISTANCE))
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (GROUPS, 16))


@triton.jit
def _transformed(x, signs, NARROW: tl.constexpr, GROUPS: tl.constexpr):
    """The Hadamard transform of each group of 16."""
    y = x * (tl.load(signs + tl.arange(0, 16)) * 0.25)[None, :]
    y = _sums_and_differences(y, 1, GROUPS)
    y = _sums_and_differences(y, 2, GROUPS)
    y = _sums_and_differences(y, 4, GROUPS)
    y = _sums_and_differences(y, 8, GROUPS)
    if NARROW:
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = tl.where(y == y, rounded.to(tl.float32, bitcast=True), y)
    return y


@triton.jit
def _loaded(
    x, signs, row, column, exists, d,
    TRANSFORM: tl.constexpr, NARROW: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    value = tl.load(x + row * d + column, mask=exists, other=0.0).to(tl.float32)
    if TRANSFORM:
        value = _transformed(value, signs, NARROW, GROUPS)
    return value


@triton.jit
def _amax_kernel(
    x, signs, amax, num_groups, of_one, d,
    KIND: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    TRANSFORM: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    first, row, column = _places(groups, d, KIND, SIZE)
    exists = groups[:, None] < num_groups
    value = _loaded(x, signs, row, column, exists, d, TRANSFORM, NARROW, GROUPS)
    magnitude = _magnitude(value)
    most = tl.max(tl.where(magnitude < _INFINITY, magnitude, 0), axis=1)
    tl.atomic_max(amax + first // of_one, most, mask=groups < num_groups)


@triton.jit
def _scales(most, amax, STOCHASTIC: tl.constexpr):
    """Of groups: the code of the scale, what elements are multiplied by, and their unit."""
    encode = tl.where(amax == 0.0, 1.0, tl.minimum(tl.div_rn(2688.0, amax), _LARGEST))
    # 2^-128 is compared by its bits: as a constant Triton would make it float64.
    scale = tl.maximum(tl.div_rn(amax, 2688.0).to(tl.int32, bitcast=True), 1 << 21)
    scale = tl.where(amax == 0.0, 0.0, scale.to(tl.float32, bitcast=True))
    is_bad = most >= _INFINITY
    own = tl.where(is_bad, 0, most).to(tl.float32, bitcast=True)
    wanted = tl.minimum(own * (encode * 0.1666666716337204), 448.0)
    exponent = tl.maximum(wanted.to(tl.int32, bitcast=True) >> 23, 121)
    shift = ((exponent + 20) << 23).to(tl.float32, bitcast=True)
    shifted = wanted + shift
    value = shifted - shift
    code = shifted.to(tl.int32, bitcast=True) - shift.to(tl.int32, bitcast=True)
    code += (exponent - 121) << 3
    if STOCHASTIC:
        is_below = value < wanted
        step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        value = tl.where(is_below, value + step, value)
        code += is_below.to(tl.int32)
    factor = tl.minimum(tl.div_rn(1.0, value * tl.div_rn(1.0, encode)), _LARGEST)
    unit = tl.where(is_bad, float("nan"), value * scale)
    return tl.where(is_bad, 0x7F, code), tl.where(is_bad, 0.0, factor), unit


@triton.jit
def _quantize_kernel(
    x, signs, amax, codes, scales, values, places, num_groups, of_one, d, first_column, seed,
    KIND: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    TRANSFORM: tl.constexpr, NARROW: tl.constexpr,
    STOCHASTIC: tl.constexpr, PACK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    first, row, column = _places(groups, d, KIND, SIZE)
    exists = groups[:, None] < num_groups
    value = _loaded(x, signs, row, column, exists, d, TRANSFORM, NARROW, GROUPS)
    most = tl.max(_magnitude(value), axis=1)
    whole = tl.load(amax + first // of_one, mask=groups < num_groups, other=1.0)
    code, factor, unit = _scales(most, whole, STOCHASTIC)

    y = value * factor[:, None]
    magnitude = tl.where(tl.abs(y) < 6.0, tl.abs(y), 6.0)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, 127)
    if STOCHASTIC:
        position = tl.load(places + row, mask=exists, other=0)
        random = bits_of_elements(first_column + column, position, seed, ROUNDS)
        uniform = (random.to(tl.float32) + 0.5) * 0.0000152587890625
        inverse = ((255 - exponent) << 23).to(tl.float32, bitcast=True)
        steps = (magnitude * inverse + uniform).to(tl.int32)
        element = steps.to(tl.float32) * ((exponent - 1) << 23).to(tl.float32, bitcast=True)
    else:
        shift = ((exponent + 22) << 23).to(tl.float32, bitcast=True)
        shifted = magnitude + shift
        steps = shifted.to(tl.int32, bitcast=True) - shift.to(tl.int32, bitcast=True)
        element = shifted - shift
    is_negative = y < 0.0
    if PACK:
        four = steps + ((exponent - 127) << 1) + tl.where(is_negative, 8, 0)
        four = tl.where(unit[:, None] == unit[:, None], four, 0)
        even, odd = tl.split(tl.reshape(four, (GROUPS, SIZE // 2, 2)))
        row_even, _ = tl.split(tl.reshape(row, (GROUPS, SIZE // 2, 2)))
        column_even, _ = tl.split(tl.reshape(column, (GROUPS, SIZE // 2, 2)))
        at = (row_even * d + column_even) // 2
        tl.store(codes + at, (even | odd << 4).to(tl.uint8), mask=exists)
        tl.store(scales + groups, code.to(tl.uint8), mask=groups < num_groups)
    else:
        element = tl.where(is_negative, element * -1.0, element)
        tl.store(values + row * d + column, element * unit[:, None], mask=exists)


def quantize_triton(x: Tensor, amax: Tensor | None, tile_rows: int, noise: Placed | None) -> Parts:
    """Shapes as in `nemotron3.ops.nvfp4.reference.quantize_reference`; x also in bfloat16."""
    batch, rows, d = x.shape
    codes = torch.empty(batch, rows, d // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, rows // tile_rows, d // BLOCK, dtype=torch.uint8, device=x.device)
    kind = "rows" if tile_rows == 1 else "tiles"
    found = _run(x, amax, kind, noise, (codes, scales, None), None)
    return Parts(codes, scales.view(torch.float8_e4m3fn), of_tensor(found)[1])


def fake_quantize_triton(
    x: Tensor,
    amax: Tensor | None,
    kind: Kind,
    noise: Placed | None,
    transform: Transform | None,
) -> Tensor:
    """Shapes as in `nemotron3.ops.nvfp4.reference.fake_quantize_reference`; x also in bfloat16."""
    values = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _run(x, amax, kind, noise, (None, None, values), transform)
    return values


def _run(
    x: Tensor,
    amax: Tensor | None,
    kind: Kind,
    noise: Placed | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    transform: Transform | None,
) -> Tensor:
    """Fill the outputs: codes and scales, or values. Returns amax."""
    batch, rows, d = x.shape
    size = BLOCK * BLOCK if kind == "tiles" else BLOCK
    num_groups = x.numel() // size
    grid = (triton.cdiv(num_groups, _ELEMENTS // size),)
    signs = None if transform is None else transform.signs
    options = {
        "KIND": kind,
        "SIZE": size,
        "GROUPS": _ELEMENTS // size,
        "TRANSFORM": transform is not None,
        "NARROW": transform is not None and transform.dtype == torch.bfloat16,
        "enable_fp_fusion": False,  # a fused multiply-add would round once, not twice
    }
    if amax is None:
        amax = torch.zeros(batch, device=x.device)
        if num_groups:
            _amax_kernel[grid](x, signs, amax.view(torch.int32), num_groups, rows, d, **options)
    if num_groups:
        bits = None if noise is None else noise.bits
        _quantize_kernel[grid](
            x, signs, amax, *outputs, noise and noise.rows, num_groups, rows, d,
            noise.first_column if noise else 0, bits.seed | bits.stream << 32 if bits else 0,
            STOCHASTIC=noise is not None, PACK=outputs[2] is None, ROUNDS=ROUNDS, **options,
        )  # fmt: skip
    return amax
