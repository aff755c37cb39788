"""Dense products in C++ (see native.cpp)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import NativeFunction, ParallelKernel, name_of
from nemotron3.ops.weights import (
    FP8Weight,
    Int8Weight,
    LowRankWeight,
    NVFP4Weight,
    QuantizedWeight,
)

_SOURCE = Path(__file__).with_name("native.cpp")
_FLOAT32, _BFLOAT16 = torch.float32, torch.bfloat16
_forward = {
    dtypes: ParallelKernel(_SOURCE, f"linear_forward_{name_of(*dtypes)}", "ppp iiii")
    for dtypes in (
        (_FLOAT32, _FLOAT32, _FLOAT32),
        (_FLOAT32, _BFLOAT16, _FLOAT32),
        (_BFLOAT16, _BFLOAT16, _BFLOAT16),
        (_BFLOAT16, _BFLOAT16, _FLOAT32),
        (_BFLOAT16, _FLOAT32, _BFLOAT16),
        (_BFLOAT16, _FLOAT32, _FLOAT32),
    )
}
"""The kernels of plain weights, by the dtypes of x, weight and result."""
_forward_quantized: dict[tuple[str, str | None], ParallelKernel] = {
    ("int8", None): ParallelKernel(_SOURCE, "linear_forward_int8", "pppp iiii"),
    ("fp8", None): ParallelKernel(_SOURCE, "linear_forward_fp8", "pppp iiii"),
    ("nvfp4", None): ParallelKernel(_SOURCE, "linear_forward_nvfp4", "ppppp iiii"),
    ("int8", "int8"): ParallelKernel(_SOURCE, "linear_forward_int8_int8", "pppp iiii"),
    ("nvfp4", "int8"): ParallelKernel(_SOURCE, "linear_forward_nvfp4_int8", "ppppp iiii"),
}
"""Kernels that read a matrix without dequantizing it, by formats of weight and activations."""
_low_rank = ParallelKernel(_SOURCE, "linear_low_rank", "ppppp iiiii f")
_backward_input = {
    dtypes: NativeFunction(_SOURCE, f"linear_backward_input_{name_of(*dtypes)}", "ppp iii")
    for dtypes in ((_FLOAT32, _FLOAT32), (_BFLOAT16, _BFLOAT16), (_BFLOAT16, _FLOAT32))
}
"""By the dtypes of the gradient and of the weight."""
_backward_input_quantized: dict[type[QuantizedWeight], NativeFunction] = {
    Int8Weight: NativeFunction(_SOURCE, "linear_backward_input_int8", "pppp iii"),
    FP8Weight: NativeFunction(_SOURCE, "linear_backward_input_fp8", "pppp iii"),
    NVFP4Weight: NativeFunction(_SOURCE, "linear_backward_input_nvfp4", "ppppp iii"),
}
_backward_weight = {
    dtype: NativeFunction(_SOURCE, f"linear_backward_weight_{name_of(dtype)}", "ppp iiiii")
    for dtype in (_FLOAT32, _BFLOAT16)
}


def linear_native(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; shapes as in `nemotron3.ops.linear.api.linear`."""
    (y,) = linear_parts_native(x, weight, [weight.shape[0]])
    return y


def linear_parts_native(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Parts of x W^T; shapes as in `nemotron3.ops.linear.api.linear_parts`."""
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    weight = weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        parts = _Linear.apply(rows, weight, sizes)
    else:
        parts = _split(product(rows, weight), sizes)
    return parts if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in parts)


def linear_narrow_native(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for a bfloat16 weight, of which only gradients need a float32 copy."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return linear_native(x, weight.to(x.dtype))
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return product(rows, weight.contiguous()).view(*x.shape[:-1], weight.shape[0])


def linear_quantized_native(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T for codes and scales, which are read without dequantizing the matrix.

    The product is that of float32; x may be bfloat16.
    """
    if x.dtype == _BFLOAT16:
        return linear_quantized_native(x.to(_FLOAT32), weight).to(_BFLOAT16)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if torch.is_grad_enabled() and x.requires_grad:
        y = _QuantizedLinear.apply(rows, weight)
    else:
        y = _quantized_product(rows, weight)
    return y.view(*x.shape[:-1], y.shape[1])


def linear_low_rank_native(x: Tensor, weight: LowRankWeight) -> Tensor:
    """The product with codes, and that with their low-rank change added; it has no gradients."""
    if x.dtype == _BFLOAT16:
        return linear_low_rank_native(x.to(_FLOAT32), weight).to(_BFLOAT16)
    rows = contiguous_rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    A, B = (part.to(_FLOAT32).contiguous() for part in (weight.A, weight.B))
    y = _quantized_product(rows, weight.base)
    (outputs, inputs), rank = weight.shape, len(A)
    narrow = x.new_empty(len(rows), rank)
    sizes = (len(rows), outputs, inputs, rank, rows.stride(0), weight.scale)
    _low_rank(rows, A, B, narrow, y, *sizes, work=len(rows) * rank * (outputs + inputs))
    return y.view(*x.shape[:-1], outputs)


def _quantized_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    x, parts = contiguous_rows(x), [part.contiguous() for part in weight.buffers()]
    rows, (outputs, inputs) = x.shape[0], weight.shape
    y = x.new_empty(rows, outputs)
    work = rows * outputs * inputs
    forward = _forward_quantized[weight.format, weight.activations]
    forward(x, *parts, y, rows, outputs, inputs, x.stride(0), work=work)
    return y


def product(x: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """x [rows, d_in] W^T, for a contiguous W [d_out, d_in]; written to `into` if given.

    Beside a bfloat16 x a float32 W is rounded as it is read, and `into` may be float32.
    """
    x = contiguous_rows(x)
    outputs, inputs = weight.shape
    y = x.new_empty(x.shape[0], outputs) if into is None else into
    rows = x.shape[0]
    work = rows * outputs * inputs
    forward = _forward[x.dtype, weight.dtype, y.dtype]
    forward(x, weight, y, rows, outputs, inputs, x.stride(0), work=work)
    return y


def input_gradient(*dy: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """dy [rows, d_out] W, for a contiguous W [d_out, d_in]; written to `into` if given.

    `dy` may be several tensors, whose columns are concatenated.
    """
    dy = tuple(map(contiguous_rows, dy))
    rows, (outputs, inputs) = len(dy[0]), weight.shape
    dx = dy[0].new_empty(rows, inputs) if into is None else into
    _backward_input[dx.dtype, weight.dtype](_places(dy), weight, dx, rows, outputs, inputs)
    return dx


def weight_gradient(*dy: Tensor, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """dy^T x [d_out, d_in] in float32, added to `add_to` if given; `dy` may be several tensors."""
    dy, x = tuple(map(contiguous_rows, dy)), contiguous_rows(x)
    rows, inputs = x.shape
    outputs = sum(part.shape[1] for part in dy)
    dw = x.new_empty(outputs, inputs, dtype=_FLOAT32) if add_to is None else add_to
    sizes = (rows, outputs, inputs, x.stride(0))
    _backward_weight[x.dtype](_places(dy), x, dw, *sizes, int(add_to is not None))
    return dw


def _places(parts: Sequence[Tensor]) -> Tensor:
    """Addresses, strides and widths of a matrix's parts, as native.cpp reads them."""
    return torch.tensor([(part.data_ptr(), part.stride(0), part.shape[1]) for part in parts])


def _split(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return (y,) if len(sizes) == 1 else y.split(sizes, dim=-1)


class _Linear(torch.autograd.Function):
    """A product that is split into columns; the gradients of the parts are never concatenated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        needs_input, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_input else None)
        ctx.weight_dtype = weight.dtype
        return _split(product(x, weight), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = None if weight is None else input_gradient(*grads, weight=weight)
        dw = None if x is None else weight_gradient(*grads, x=x).to(ctx.weight_dtype)
        return dx, dw, None


class _QuantizedLinear(torch.autograd.Function):
    """A product that reads codes in both directions, a tile of which is decoded at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return _quantized_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight: QuantizedWeight = ctx.weight
        grad, parts = contiguous_rows(grad), [part.contiguous() for part in weight.buffers()]
        rows, (outputs, inputs) = len(grad), weight.shape
        dx = grad.new_empty(rows, inputs)
        backward = _backward_input_quantized[type(weight)]
        backward(_places((grad,)), *parts, dx, rows, outputs, inputs)
        return dx, None
