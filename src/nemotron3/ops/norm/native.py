"""Both norms in C++ (see native.cpp)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import NativeFunction, ParallelKernel, name_of

_SOURCE = Path(__file__).with_name("native.cpp")
_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
"""Of x and weight."""
_forward = {
    dtypes: ParallelKernel(_SOURCE, f"norm_forward_{name_of(*dtypes)}", "pppp iiiii f")
    for dtypes in _DTYPES
}
_backward = {
    dtypes: NativeFunction(_SOURCE, f"norm_backward_{name_of(*dtypes)}", "ppppppp iiiiii f")
    for dtypes in _DTYPES
}


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis."""
    return _apply(x, None, weight, 1, eps)


def gated_group_norm_native(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """RMS norm of x SiLU(gate) within each of `groups` equal parts of the last axis."""
    return _apply(x, gate, weight, groups, eps)


def _apply(x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float) -> Tensor:
    shape, dtype = x.shape, x.dtype
    if dtype == torch.float32:
        weight = weight.to(dtype)
    if gate is not None and gate.dtype != dtype:
        x, gate, weight = x.float(), gate.float(), weight.float()
    x, weight = _rows(x), weight.contiguous()
    gate = None if gate is None else _rows(gate)
    learns = any(t is not None and t.requires_grad for t in (x, gate, weight))
    norm = _Norm.apply if torch.is_grad_enabled() and learns else _norm
    return norm(x, gate, weight, groups, eps).view(shape).to(dtype)


def _rows(x: Tensor) -> Tensor:
    return contiguous_rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def _norm(x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float) -> Tensor:
    y = x.new_empty(x.shape)
    strides = (x.stride(0), 0 if gate is None else gate.stride(0))
    _forward[x.dtype, weight.dtype](
        x, gate, weight, y, *x.shape, groups, *strides, eps, work=x.numel()
    )
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.groups, ctx.eps = groups, eps
        return _norm(x, gate, weight, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        dy = contiguous_rows(dy)
        dx, d_weight = x.new_empty(x.shape), torch.empty_like(weight, dtype=torch.float32)
        d_gate = None if gate is None else x.new_empty(x.shape)
        strides = (x.stride(0), 0 if gate is None else gate.stride(0), dy.stride(0))
        _backward[x.dtype, weight.dtype](
            x, gate, weight, dy, dx, d_gate, d_weight, *x.shape, ctx.groups, *strides, ctx.eps
        )
        return dx, d_gate, d_weight.to(weight.dtype), None, None
