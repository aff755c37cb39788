"""Dense products in C++ (native.cpp says how)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron3.ops.native import NativeFunction, TeamFunction, contiguous_rows

_SOURCE = Path(__file__).with_name("native.cpp")
_forward = TeamFunction(_SOURCE, "linear_forward", "ppp iiii")
_backward_input = NativeFunction(_SOURCE, "linear_backward_input", "ppp iiii")
_backward_weight = NativeFunction(_SOURCE, "linear_backward_weight", "ppp iiiiii")


def linear_native(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; shapes as in `nemotron3.ops.linear.api.linear`."""
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    weight = weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _Linear.apply(rows, weight)
    else:
        y = product(rows, weight)
    return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])


def product(x: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """x [rows, d_in] W^T, for a contiguous W [d_out, d_in]; written `into` where it is given."""
    x = contiguous_rows(x)
    outputs, inputs = weight.shape
    y = x.new_empty(x.shape[0], outputs) if into is None else into
    rows = x.shape[0]
    work = rows * outputs * inputs
    _forward(x, weight, y, rows, outputs, inputs, x.stride(0), work=work)
    return y


def input_gradient(dy: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """dy [rows, d_out] W, for a contiguous W [d_out, d_in]; written `into` where it is given."""
    dy = contiguous_rows(dy)
    outputs, inputs = weight.shape
    dx = dy.new_empty(dy.shape[0], inputs) if into is None else into
    _backward_input(dy, weight, dx, dy.shape[0], outputs, inputs, dy.stride(0))
    return dx


def weight_gradient(dy: Tensor, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """dy^T x [d_out, d_in], added to `add_to` where it is given."""
    dy, x = contiguous_rows(dy), contiguous_rows(x)
    rows, outputs, inputs = dy.shape[0], dy.shape[1], x.shape[1]
    dw = dy.new_empty(outputs, inputs) if add_to is None else add_to
    strides = (dy.stride(0), x.stride(0))
    _backward_weight(dy, x, dw, rows, outputs, inputs, *strides, int(add_to is not None))
    return dw


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_input, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_input else None)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = None if weight is None else input_gradient(grad, weight)
        dw = None if x is None else weight_gradient(grad, x)
        return dx, dw
