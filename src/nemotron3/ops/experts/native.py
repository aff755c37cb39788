"""Routed experts in C++ (see native.cpp).

Training keeps the result of the first product, a row of hidden units for each token and choice:
recomputing it would cost a sixth of the arithmetic. The `recompute` of whole blocks is for machines
without the memory.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemotron3.ops.experts.activations import Activation, up_factor
from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import FLOATS, NativeFunction, ParallelKernel, name_of
from nemotron3.ops.weights import ExpertMatrices, LowRankWeight, QuantizedWeight, Weight

_SOURCE = Path(__file__).with_name("native.cpp")
_order = ParallelKernel(_SOURCE, "experts_order", "pppp ii")
_forward = {
    name: ParallelKernel(_SOURCE, f"experts_forward_{name}", "pp pp ppp pppp pppp iiiiiii ii ff")
    for name in (
        *("float32", "bfloat16", "int8", "fp8", "nvfp4", "int8_int8", "nvfp4_int8"),
        *("of_bfloat16_float32", "of_bfloat16_bfloat16"),
    )
}
"""The kernels that multiply with matrices as they are stored, each where a table says; the second
name is what activations are rounded to.

Those whose names begin with `of_bfloat16` take activations in bfloat16.
"""
_backward = {
    name: ParallelKernel(_SOURCE, f"experts_backward_{name}", "pp pp ppp pp ppppp iiiiiiii")
    for name in (
        *("float32", "int8", "fp8", "nvfp4"),
        *("of_bfloat16_float32", "of_bfloat16_bfloat16"),
    )
}
_activate = {
    dtype: ParallelKernel(_SOURCE, f"activate_forward_{name_of(dtype)}", "pp iii")
    for dtype in FLOATS
}
_activate_backward = {
    dtype: NativeFunction(_SOURCE, f"activate_backward_{name_of(dtype)}", "ppp iii")
    for dtype in FLOATS
}
_ACTIVATIONS = {"relu2": 0, "swiglu": 1}

_FEW_ROWS = 12
"""Average rows per expert up to which transposing the matrices costs more than it gains."""

_Operands = tuple[Tensor, Tensor, Weight, Weight]
"""x, weights, up and down."""
_Change = tuple[Tensor | None, Tensor | None, int, float]
"""A and B of all experts, their rank and their scale."""
_UNCHANGED: _Change = (None, None, 0, 0.0)
Order = tuple[Tensor, Tensor, Tensor]
"""Each expert's first row, each row's (token, choice), and each (token, choice)'s row."""


def routed_experts_native(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Apply all experts; shapes as in `nemotron3.ops.experts.api.routed_experts`.

    Activations and matrices are float32 or bfloat16, and matrices beside bfloat16 are rounded to it
    as they are read. The router's weights are float32.
    """
    if x.dtype == torch.float32 or up.dtype != down.dtype:
        up, down = up.to(x.dtype), down.to(x.dtype)
    return _routed(x, indices, weights, up.contiguous(), down.contiguous(), activation)


def routed_experts_narrow_native(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """The same for bfloat16 matrices, of which only gradients need float32 copies."""
    needs_grad = any(t.requires_grad for t in (x, weights, up, down))
    if up.dtype != down.dtype or (torch.is_grad_enabled() and needs_grad):
        up, down = up.to(x.dtype), down.to(x.dtype)
    return _routed(x, indices, weights, up.contiguous(), down.contiguous(), activation)


def routed_experts_quantized_native(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    activation: Activation,
) -> Tensor:
    """The same for codes, of which a tile is decoded at a time in both directions.

    The products are those of float32; x may be bfloat16.
    """
    if x.dtype == torch.bfloat16:
        y = routed_experts_quantized_native(x.float(), indices, weights, up, down, activation)
        return y.to(x.dtype)
    return _routed(x, indices, weights, up, down, activation)


def routed_experts_low_rank_native(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: QuantizedWeight | LowRankWeight,
    down: QuantizedWeight | LowRankWeight,
    activation: Activation,
) -> Tensor:
    """The same with a low-rank change of either matrix or both; it has no gradients."""
    if x.dtype == torch.bfloat16:
        y = routed_experts_low_rank_native(x.float(), indices, weights, up, down, activation)
        return y.to(x.dtype)
    (own_up, up_change), (own_down, down_change) = map(_base_and_change, (up, down))
    operands = (contiguous_rows(x), weights.float().contiguous(), own_up, own_down)
    order = order_rows(indices.contiguous(), up.shape[0])
    return _apply(operands, order, activation, changes=(up_change, down_change))


def _base_and_change(weight: QuantizedWeight | LowRankWeight) -> tuple[QuantizedWeight, _Change]:
    if isinstance(weight, QuantizedWeight):
        return weight, _UNCHANGED
    A, B = (part.detach().float().contiguous() for part in (weight.A, weight.B))
    return weight.base, (A, B, A.shape[-2], weight.scale)


def _routed(
    x: Tensor, indices: Tensor, weights: Tensor, up: Weight, down: Weight, activation: Activation
) -> Tensor:
    operands = (contiguous_rows(x), weights.float().contiguous(), up, down)
    order = order_rows(indices.contiguous(), up.shape[0])
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in operands):
        return _RoutedExperts.apply(*operands, order, activation)
    return _apply(operands, order, activation)


def order_rows(indices: Tensor, experts: int) -> Order:
    """Each expert's first row, each row's (token, choice), and each (token, choice)'s row."""
    bounds = indices.new_empty(experts + 1)
    sources, places = torch.empty_like(indices), torch.empty_like(indices)
    _order(indices, bounds, sources, places, indices.numel(), experts, work=0)
    return bounds, sources, places


def sizes_of(weights: Tensor, down: Weight, activation: Activation) -> tuple[int, ...]:
    """The sizes that the kernels take, beginning with tokens."""
    experts, width, hidden = down.shape
    return (*weights.shape, experts, width, hidden, _ACTIVATIONS[activation])


def _apply(
    operands: _Operands,
    order: Order,
    activation: Activation,
    kept: Tensor | None = None,
    changes: tuple[_Change, _Change] = (_UNCHANGED, _UNCHANGED),
) -> Tensor:
    """Apply all experts; the first product's result is written to `kept` [rows, up_width]."""
    x, weights, up, down = operands
    outputs = x.new_empty(weights.numel(), x.shape[1])
    y = x.new_empty(x.shape)
    few = kept is None and weights.numel() <= _FEW_ROWS * up.shape[0]
    units = x.new_empty(weights.numel(), up.shape[1]) if few else None
    sizes = sizes_of(weights, down, activation)
    work = weights.numel() * up.shape[1] * up.shape[2]
    up_table, down_table = _table(up), _table(down)
    (up_A, up_B, up_rank, up_scale), (down_A, down_B, down_rank, down_scale) = changes
    _forward[_kernel(x, up)](
        x, weights, up_table.places, down_table.places, *order, units, kept, outputs, y,
        up_A, up_B, down_A, down_B, *sizes, x.stride(0), up_rank, down_rank, up_scale, down_scale,
        work=work, keeps=(*up_table.tensors, *down_table.tensors),
    )  # fmt: skip
    return y


def _kernel(x: Tensor, weight: Weight) -> str:
    """The name of the kernels for these activations and matrices."""
    if isinstance(weight, QuantizedWeight):
        rounded = weight.activations
        return weight.format if rounded is None else f"{weight.format}_{rounded}"
    name = name_of(weight.dtype)
    return f"of_bfloat16_{name}" if x.dtype == torch.bfloat16 else name


class _Table(NamedTuple):
    """Where native.cpp finds the matrices of the experts."""

    places: Tensor
    """Addresses, int64 [expert, tensor of its matrix]."""
    tensors: tuple[Tensor, ...]
    """Those with the memory."""


def _table(weight: Weight) -> _Table:
    if isinstance(weight, ExpertMatrices):
        return _Table(weight.table, tuple(weight.buffers()))
    stacks = (weight,) if isinstance(weight, Tensor) else tuple(weight.buffers())
    stacks = tuple(stack.contiguous() for stack in stacks)
    starts = tuple(stack.data_ptr() for stack in stacks)
    strides = tuple(stack.stride(0) * stack.itemsize for stack in stacks)
    return _Table(_places_in_stacks(starts, strides, len(stacks[0])), stacks)


@functools.lru_cache(maxsize=1024)
def _places_in_stacks(starts: tuple[int, ...], strides: tuple[int, ...], experts: int) -> Tensor:
    """Numbers alone, which nobody writes: stacks stay where they are from step to step."""
    places = np.array(starts) + np.array(strides) * np.arange(experts)[:, None]
    return torch.from_numpy(places)  # an operation of PyTorch would be repeated by a recording


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Weight,
        down: Weight,
        order: Order,
        activation: Activation,
    ) -> Tensor:
        kept = x.new_empty(weights.numel(), up.shape[1])
        is_plain = isinstance(up, Tensor)
        ctx.save_for_backward(x, weights, *((up, down) if is_plain else (None, None)), kept, *order)
        ctx.quantized = None if is_plain else (up, down)  # tensors are saved above
        ctx.activation = activation
        return _apply((x, weights, up, down), order, activation, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, kept, *order = ctx.saved_tensors
        needs_x, _, needs_up, needs_down, *_ = ctx.needs_input_grad
        if up is None:
            up, down = ctx.quantized
        grad = contiguous_rows(grad)
        rows = x.new_empty(weights.numel(), x.shape[1]) if needs_x else None
        dx = x.new_empty(x.shape) if needs_x else None
        d_weights = torch.empty_like(weights)
        d_up = torch.empty_like(up, dtype=torch.float32) if needs_up else None
        d_down = torch.empty_like(down, dtype=torch.float32) if needs_down else None
        up_table, down_table = _table(up), _table(down)
        sizes = (*sizes_of(weights, down, ctx.activation), x.stride(0), grad.stride(0))
        _backward[_kernel(x, up)](
            x, weights, up_table.places, down_table.places, *order, kept, grad, rows, dx,
            d_weights, d_up, d_down, *sizes, work=weights.numel() * up.shape[1] * up.shape[2],
        )  # fmt: skip
        d_up, d_down = (
            None if d is None else d.to(t.dtype) for d, t in ((d_up, up), (d_down, down))
        )
        return dx, d_weights, d_up, d_down, None, None


def activate_native(h: Tensor, activation: Activation) -> Tensor:
    """Hidden units from the first product, in one pass over memory."""
    h = h.contiguous()
    if torch.is_grad_enabled() and h.requires_grad:
        return _Activate.apply(h, activation)
    return _hidden_units(h, activation)


def _hidden_units(h: Tensor, activation: Activation) -> Tensor:
    hidden = h.shape[-1] // up_factor(activation)
    a = h.new_empty(*h.shape[:-1], hidden)
    rows = a.numel() // hidden
    _activate[h.dtype](h, a, rows, hidden, _ACTIVATIONS[activation], work=a.numel())
    return a


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: Activation) -> Tensor:
        a = _hidden_units(h, activation)
        # The gradient of a squared ReLU follows from its result, which the next product keeps.
        ctx.save_for_backward(a if activation == "relu2" else h)
        ctx.activation = activation
        return a

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        grad, dh = grad.contiguous(), torch.empty_like(kept)
        hidden = grad.shape[-1]
        rows = grad.numel() // hidden
        _activate_backward[kept.dtype](kept, grad, dh, rows, hidden, _ACTIVATIONS[ctx.activation])
        return dh, None
