"""The entry point of MXFP8 quantization.

A block's scale is the least power of two that brings its largest magnitude within the range of the
elements: amax / 448 rounded up, as Blackwell's hardware, Transformer Engine and cuBLAS have it, so
nothing is clipped. (The specification's own example rounds down and clips.) Multiplying by a power
of two is exact, so stochastic rounding is right on the average. Blocks of zeros have the scale
2^-127. A NaN or an infinity makes its whole block NaN, and changes nothing else.
"""

from typing import get_args

from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_quantizable
from nemotron3.ops.fp8.elements import Element, check_element
from nemotron3.ops.mxfp8.native import fake_quantize_native
from nemotron3.ops.mxfp8.reference import Kind, fake_quantize_reference, quantize_reference
from nemotron3.ops.mxfp8.tensor import BLOCK, MXFP8Tensor
from nemotron3.ops.rounding.noise import Noise, Rounding, placed

_QUANTIZE = {"reference": quantize_reference, "torch": quantize_reference}
_FAKE_QUANTIZE = {
    "reference": fake_quantize_reference,
    "torch": fake_quantize_reference,
    "native": fake_quantize_native,
    "triton": Kernel("nemotron3.ops.mxfp8.triton", "fake_quantize_triton"),
}
_AXES = {"rows": ("d",), "columns": ("rows", "d")}


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
    wide = _flat(x)
    found = resolve("mxfp8", backend, _QUANTIZE, wide)(wide, element, places)
    lead = x.shape[:-1]
    return MXFP8Tensor(
        found.codes.view(x.shape), found.block_scales.view(*lead, x.shape[-1] // BLOCK)
    )


def fake_quantize(
    x: Float[Tensor, "*axes rows d"],
    kind: Kind = "rows",
    element: Element = "e4m3",
    rounding: Rounding = "nearest",
    *,
    noise: Noise | None = None,
    backend: Backend = "auto",
) -> Float32[Tensor, "*axes rows d"]:
    """The values that `quantize` would keep, in float32.

    `kind` is "rows" for blocks of 32 along the last axis, or "columns" for those of the transposed
    matrix, with the noise of the element's own place. 32 must divide the axes, of columns both.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"mxfp8: kind is {kind!r}; choose from {', '.join(get_args(Kind))}")
    check_element("mxfp8", element)
    check_quantizable("mxfp8", x, _AXES[kind], BLOCK)
    places = placed("mxfp8", rounding, noise, x)
    wide = _flat(x)
    return resolve("mxfp8", backend, _FAKE_QUANTIZE, wide)(wide, kind, element, places).view(
        x.shape
    )


def _flat(x: Tensor) -> Float[Tensor, "row d"]:
    """In float32 on a CPU; the kernels of a GPU read bfloat16 themselves."""
    wide = x.float() if x.is_cpu else x
    return wide.contiguous().view(x.shape[:-1].numel(), x.shape[-1])
