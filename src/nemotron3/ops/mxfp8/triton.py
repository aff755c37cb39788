"""Values rounded to MXFP8 as a Triton kernel, which reads x once.

A program handles some groups of 32 elements, in a row or in a column. Powers of two are made of
their bits, and elements are rounded by adding and subtracting a large number, so that the bits are
those of the reference on any device.
"""

# ruff: noqa: ANN001, ANN202, PLR0913
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron3.ops.fp8.elements import FORMATS, Element
from nemotron3.ops.mxfp8.reference import Kind
from nemotron3.ops.mxfp8.tensor import BLOCK
from nemotron3.ops.rounding.noise import ROUNDS, Placed
from nemotron3.ops.rounding.triton import bits_of_elements

_GROUPS = 64
"""Groups of a program."""
_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _fake_quantize_kernel(
    x, y, places, num_groups, d, first_column, seed,
    KIND: tl.constexpr, GROUPS: tl.constexpr, LARGEST: tl.constexpr, MANTISSA: tl.constexpr,
    LEAST: tl.constexpr, STOCHASTIC: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    s = tl.arange(0, 32)[None, :]
    if KIND == "rows":
        row = (groups // (d // 32))[:, None] + s * 0
        column = (groups % (d // 32) * 32)[:, None] + s
    else:
        row = (groups // d * 32)[:, None] + s
        column = (groups % d)[:, None] + s * 0
    exists = groups[:, None] < num_groups
    value = tl.load(x + row * d + column, mask=exists, other=0.0).to(tl.float32)

    most = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    is_bad = most >= _INFINITY
    amax = tl.where(is_bad, 0, most).to(tl.float32, bitcast=True)
    bits = tl.div_rn(amax, LARGEST).to(tl.int32, bitcast=True)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # A subnormal number above 2^-127 rounds up to 2^-126, and to 2^-127 otherwise.
    code = exponent + (mantissa > tl.where(exponent == 0, 1 << 22, 0)).to(tl.int32)
    factor = ((254 - code) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(code == 0, 1 << 22, code << 23)
    unit = tl.where(is_bad, 0x7FC00000, unit).to(tl.float32, bitcast=True)

    scaled = value * factor[:, None]
    a = tl.where(tl.abs(scaled) < LARGEST, tl.abs(scaled), LARGEST)
    e = tl.maximum(a.to(tl.int32, bitcast=True) >> 23, LEAST)
    if STOCHASTIC:
        position = tl.load(places + row, mask=exists, other=0)
        random = bits_of_elements(first_column + column, position, seed, ROUNDS)
        uniform = (random.to(tl.float32) + 0.5) * 0.0000152587890625
        inverse = ((254 + MANTISSA - e) << 23).to(tl.float32, bitcast=True)
        steps = (a * inverse + uniform).to(tl.int32).to(tl.float32)
        element = steps * ((e - MANTISSA) << 23).to(tl.float32, bitcast=True)
    else:
        shift = ((e + (23 - MANTISSA)) << 23).to(tl.float32, bitcast=True)
        element = (a + shift) - shift
    result = element * unit[:, None]
    result = tl.where(result > _LARGEST, _LARGEST, result)  # 2^128
    result = tl.where(scaled < 0.0, result * -1.0, result)
    tl.store(y + row * d + column, result, mask=exists)


def fake_quantize_triton(x: Tensor, kind: Kind, element: Element, noise: Placed | None) -> Tensor:
    """As `nemotron3.ops.mxfp8.reference.fake_quantize_reference`; x also in bfloat16."""
    values = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    num_groups = x.numel() // BLOCK
    if not num_groups:
        return values
    of = FORMATS[element]
    bits = None if noise is None else noise.bits
    _fake_quantize_kernel[(triton.cdiv(num_groups, _GROUPS),)](
        x, values, noise and noise.rows, num_groups, x.shape[1],
        noise.first_column if noise else 0, bits.seed | bits.stream << 32 if bits else 0,
        KIND=kind, GROUPS=_GROUPS, LARGEST=of.largest, MANTISSA=of.mantissa_bits,
        LEAST=127 + of.min_exponent, STOCHASTIC=noise is not None, ROUNDS=ROUNDS,
        enable_fp_fusion=False,  # a fused multiply-add would round once, not twice
    )  # fmt: skip
    return values
