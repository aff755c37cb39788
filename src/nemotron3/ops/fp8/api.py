"""The entry point of FP8 quantization with one scale for a tensor.

The scale is the tensor's largest finite magnitude over the largest element, in ModelOpt's
arithmetic: scale = amax / 448, element = e4m3(x / scale). It is at least 2^-126, the least normal
number of float32, so that tensors of zeros and of subnormal numbers keep theirs. NaN and infinities
become NaN, and change no other element.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.ops.backends import Backend, resolve
from nemotron3.ops.checks import check_operand, check_quantizable
from nemotron3.ops.fp8.elements import (
    FORMATS,
    Element,
    check_element,
    rounded_reference,
    rounded_torch,
)
from nemotron3.ops.fp8.tensor import FP8Tensor
from nemotron3.ops.rounding.noise import Noise, Rounding, placed

_ROUNDED = {"reference": rounded_reference, "torch": rounded_torch}
_LEAST_SCALE = 2.0**-126


def quantize(
    x: Float[Tensor, "*axes d"],
    element: Element = "e4m3",
    rounding: Rounding = "nearest",
    *,
    noise: Noise | None = None,
    amax: Float32[Tensor, "*batch"] | None = None,
    batch_dims: int = 0,
    backend: Backend = "auto",
) -> FP8Tensor:
    """Quantize a float32 or bfloat16 tensor.

    `noise`, `amax` and `batch_dims` are as in `nemotron3.ops.nvfp4.quantize`, and so are the
    errors; any size will do.
    """
    check_element("fp8", element)
    check_quantizable("fp8", x, ("d",), 1, batch_dims)
    places = placed("fp8", rounding, noise, x)
    batch = x.shape[:batch_dims]
    wide = x.float().contiguous()
    is_finite = wide.abs() < torch.inf
    if amax is None:
        finite = torch.where(is_finite, wide.abs(), 0.0).reshape(batch.numel(), -1)
        amax = finite.amax(1) if finite.shape[1] else finite.new_zeros(len(finite))
    else:
        check_operand("fp8", "amax", amax, batch, x, same_dtype=False)
    most = torch.full_like(amax.float(), FORMATS[element].largest)
    scale = (amax.float() / most).clamp(min=_LEAST_SCALE).view(batch)
    scaled = wide / scale.view(*batch, *[1] * (x.dim() - batch_dims))
    scaled = torch.where(is_finite, scaled, torch.nan)
    return FP8Tensor(resolve("fp8", backend, _ROUNDED, scaled)(scaled, element, places), scale)
