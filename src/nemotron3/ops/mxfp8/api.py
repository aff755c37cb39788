"""The entry point of MXFP8 quantization.

A block's scale is the least power of two that brings its largest magnitude within the range of the
elements: amax / 448 rounded up, as Blackwell's hardware, Transformer Engine and cuBLAS have it, so
nothing is clipped. (The specification's own example rounds down and clips.) Multiplying by a power
of two is exact, so stochastic rounding is right on the average. Blocks of zeros have the scale
2^-127. A NaN or an infinity makes its whole block NaN, and changes nothing else.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.ops.backends import Backend, resolve
from nemotron3.ops.checks import check_quantizable
from nemotron3.ops.fp8.elements import (
    DTYPES,
    FORMATS,
    Element,
    check_element,
    rounded_reference,
    rounded_torch,
)
from nemotron3.ops.mxfp8.tensor import BLOCK, MXFP8Tensor
from nemotron3.ops.rounding.noise import Noise, Rounding, placed

_ROUNDED = {"reference": rounded_reference, "torch": rounded_torch}
_NAN = 255


def quantize(
    x: Float[Tensor, "*axes d"],
    element: Element = "e4m3",
    rounding: Rounding = "nearest",
    *,
    noise: Noise | None = None,
    backend: Backend = "auto",
) -> MXFP8Tensor:
    """Quantize a float32 or bfloat16 tensor; 32 must divide its last axis.

    Stochastic rounding needs `noise`. The errors are those of `nemotron3.ops.nvfp4.quantize`.
    """
    check_element("mxfp8", element)
    check_quantizable("mxfp8", x, ("d",), BLOCK)
    places = placed("mxfp8", rounding, noise, x)
    blocks = x.float().contiguous().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    is_finite = amax < torch.inf
    exponents = _rounded_up(torch.where(is_finite, amax, 0.0), FORMATS[element].largest)
    scaled = torch.ldexp(blocks, 127 - exponents)
    scaled = torch.where(is_finite, scaled, 0.0).view(x.shape)
    codes = resolve("mxfp8", backend, _ROUNDED, scaled)(scaled, element, places)
    scales = torch.where(is_finite, exponents, _NAN).squeeze(-1).to(torch.uint8)
    return MXFP8Tensor(codes.view(DTYPES[element]), scales.view(torch.float8_e8m0fnu))


def _rounded_up(amax: Float32[Tensor, "*block"], largest: float) -> Tensor:
    """The code of the least power of two that is not below amax / largest."""
    bits = (amax / torch.full_like(amax, largest)).view(torch.int32)
    exponents, mantissas = bits >> 23, bits & 0x7FFFFF
    # A subnormal number above 2^-127 rounds up to 2^-126, and to 2^-127 otherwise.
    return exponents + (mantissas > torch.where(exponents == 0, 1 << 22, 0))
