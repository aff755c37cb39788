"""NVFP4 quantization in C++ (see native.cpp)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nemotron3.ops.native import ParallelKernel
from nemotron3.ops.nvfp4.four_over_six import MOST as MOST_OF_FOUR_OVER_SIX
from nemotron3.ops.nvfp4.reference import Kind, Parts, Transform, of_tensor
from nemotron3.ops.nvfp4.tensor import BLOCK
from nemotron3.ops.rounding.noise import Noise, Placed

ScalesByError = Literal["mse", "four_over_six"]
_KINDS = {"rows": 0, "tiles": 1, "columns": 2, "four_over_six": 3, "mse": 4}
_quantize = ParallelKernel(
    Path(__file__).with_name("native.cpp"), "nvfp4_quantize", "ppppppp iiiiiiiiii"
)
_ms_eden = ParallelKernel(
    Path(__file__).with_name("native.cpp"), "nvfp4_ms_eden", "pppp iiiiiiiiiii"
)
_WORK = 4
"""Cost of an element, in multiply-adds."""


def quantize_native(x: Tensor, amax: Tensor | None, tile_rows: int, noise: Placed | None) -> Parts:
    """Shapes as in `nemotron3.ops.nvfp4.reference.quantize_reference`."""
    batch, rows, d = x.shape
    codes = torch.empty(batch, rows, d // 2, dtype=torch.uint8)
    scales = torch.empty(batch, rows // tile_rows, d // BLOCK, dtype=torch.uint8)
    kind = "rows" if tile_rows == 1 else "tiles"
    found = _run(x, amax, kind, noise, (codes, scales, None), None)
    return Parts(codes, scales.view(torch.float8_e4m3fn), of_tensor(found)[1])


def four_over_six_native(x: Tensor, amax: Tensor | None) -> Parts:
    """Shapes as in `nemotron3.ops.nvfp4.four_over_six.four_over_six`."""
    codes, scales, found = _by_error(x, amax, "four_over_six")
    return Parts(codes, scales, of_tensor(found, MOST_OF_FOUR_OVER_SIX)[1])


def mse_native(x: Tensor, amax: Tensor | None) -> Parts:
    """Shapes as in `nemotron3.ops.nvfp4.mse.mse`."""
    codes, scales, found = _by_error(x, amax, "mse")
    return Parts(codes, scales, of_tensor(found)[1])


def _by_error(x: Tensor, amax: Tensor | None, kind: ScalesByError) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and amax."""
    batch, rows, d = x.shape
    codes = torch.empty(batch, rows, d // 2, dtype=torch.uint8)
    scales = torch.empty(batch, rows, d // BLOCK, dtype=torch.uint8)
    found = _run(x, amax, kind, None, (codes, scales, None), None)
    return codes, scales.view(torch.float8_e4m3fn), found


def fake_four_over_six_native(x: Tensor, amax: Tensor | None) -> Tensor:
    """The values, in the shape of `x`."""
    values = torch.empty_like(x)
    _run(x, amax, "four_over_six", None, (None, None, values), None)
    return values


def fake_quantize_native(
    x: Tensor,
    amax: Tensor | None,
    kind: Kind,
    noise: Placed | None,
    transform: Transform | None,
) -> Tensor:
    """Shapes as in `nemotron3.ops.nvfp4.reference.fake_quantize_reference`."""
    values = torch.empty_like(x)
    _run(x, amax, kind, noise, (None, None, values), transform)
    return values


def fake_ms_eden_native(
    x: Tensor,
    kind: Literal["rows", "columns"],
    rotation: Noise,
    noise: Placed,
    amax: Tensor | None,
) -> Tensor:
    """Shapes as in `nemotron3.ops.nvfp4.ms_eden.fake_ms_eden_reference`."""
    batch, rows, d = x.shape
    values = torch.empty_like(x)
    _ms_eden(
        x,
        torch.zeros(batch) if amax is None else amax,
        values,
        noise.rows,
        batch * rows,
        rows,
        d,
        kind == "columns",
        amax is not None,
        noise.first_column // BLOCK,
        rotation.bits.seed,
        rotation.bits.stream,
        noise.bits.seed,
        noise.bits.stream,
        noise.bits.rounds,
        work=3 * _WORK * x.numel(),
    )
    return values


def _run(
    x: Tensor,
    amax: Tensor | None,
    kind: Kind | ScalesByError,
    noise: Placed | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    transform: Transform | None,
) -> Tensor:
    """Fill the outputs: codes and scales, or values. Returns amax."""
    batch, rows, d = x.shape
    bits = noise and noise.bits
    found = torch.zeros(batch) if amax is None else amax
    _quantize(
        x,
        found,
        *outputs,
        transform and transform.signs,
        noise and noise.rows,
        batch * rows,
        rows,
        d,
        _KINDS[kind],
        amax is not None,
        transform is not None and transform.dtype == torch.bfloat16,
        noise.first_column if noise else 0,
        *((bits.seed, bits.stream, bits.rounds) if bits else (0, 0, 0)),
        work=_WORK * x.numel(),
    )
    return found
