"""Values rounded to MXFP8 in C++ (see native.cpp)."""

from pathlib import Path

import torch
from torch import Tensor

from nemotron3.ops.fp8.elements import Element
from nemotron3.ops.mxfp8.reference import Kind
from nemotron3.ops.native import ParallelKernel
from nemotron3.ops.rounding.noise import Placed

_ELEMENTS = {"e4m3": 0, "e5m2": 1}
_fake_quantize = ParallelKernel(
    Path(__file__).with_name("native.cpp"), "mxfp8_fake_quantize", "ppp iiiiiiii"
)
_WORK = 4
"""Cost of an element, in multiply-adds."""


def fake_quantize_native(x: Tensor, kind: Kind, element: Element, noise: Placed | None) -> Tensor:
    """Shapes as in `nemotron3.ops.mxfp8.reference.fake_quantize_reference`."""
    values = torch.empty_like(x)
    bits = None if noise is None else noise.bits
    _fake_quantize(
        x,
        values,
        None if noise is None else noise.rows,
        *x.shape,
        _ELEMENTS[element],
        kind == "columns",
        0 if noise is None else noise.first_column,
        *((0, 0, 0) if bits is None else (bits.seed, bits.stream, bits.rounds)),
        work=_WORK * x.numel(),
    )
    return values
