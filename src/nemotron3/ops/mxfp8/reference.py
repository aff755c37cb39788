"""The definition of MXFP8 quantization.

    scale   = the least power of two >= amax / 448, 2^-127 at least
    element = e4m3(x / scale)

amax is the largest magnitude of the block. Dividing by a power of two is exact.
"""

from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.ops.fp8.elements import DTYPES, FORMATS, Element
from nemotron3.ops.minifloat import nearest, stochastic
from nemotron3.ops.mxfp8.tensor import BLOCK, MXFP8Tensor
from nemotron3.ops.rounding.noise import Placed, uniform

Kind = Literal["rows", "columns"]
"""Blocks of 32 in a row, of 32 in a column."""
_NAN = 255


def quantize_reference(
    x: Float[Tensor, "row column"], element: Element, noise: Placed | None
) -> MXFP8Tensor:
    """Blocks of 32 along the last axis."""
    return _quantized(x.float(), element, None if noise is None else uniform(x.shape, noise))


def fake_quantize_reference(
    x: Float[Tensor, "row column"], kind: Kind, element: Element, noise: Placed | None
) -> Float32[Tensor, "row column"]:
    """The values of the quantized tensor."""
    x = x.float()
    random = None if noise is None else uniform(x.shape, noise)
    if kind == "rows":
        return _quantized(x, element, random).dequantize()
    values = _quantized(x.T.contiguous(), element, None if random is None else random.T)
    return values.dequantize().T.contiguous()


def _quantized(x: Tensor, element: Element, random: Tensor | None) -> MXFP8Tensor:
    of = FORMATS[element]
    blocks = x.unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    is_finite = amax < torch.inf
    exponents = _rounded_up(torch.where(is_finite, amax, 0.0), of.largest)
    scaled = torch.where(is_finite, torch.ldexp(blocks, 127 - exponents), 0.0).view(x.shape)
    codes = nearest(scaled, of) if random is None else stochastic(scaled, of, random)
    scales = torch.where(is_finite, exponents, _NAN).squeeze(-1).to(torch.uint8)
    return MXFP8Tensor(codes.view(DTYPES[element]), scales.view(torch.float8_e8m0fnu))


def _rounded_up(amax: Float32[Tensor, "*block"], largest: float) -> Tensor:
    """The code of the least power of two that is not below amax / largest."""
    bits = (amax / torch.full_like(amax, largest)).view(torch.int32)
    exponents, mantissas = bits >> 23, bits & 0x7FFFFF
    # A subnormal number above 2^-127 rounds up to 2^-126, and to 2^-127 otherwise.
    return exponents + (mantissas > torch.where(exponents == 0, 1 << 22, 0))
