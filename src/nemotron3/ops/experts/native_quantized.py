"""Routed experts with operands rounded to NVFP4, in C++ (see quantized.cpp)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.experts.activations import Activation
from nemotron3.ops.experts.native import Order, order_rows, sizes_of
from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.low_precision import (
    ExpertsQuantization,
    Operands,
    Product,
    ProductQuantization,
)
from nemotron3.ops.native import NativeFunction, ParallelKernel
from nemotron3.ops.nvfp4 import SIGNS
from nemotron3.ops.rounding import RandomBits
from nemotron3.ops.rounding.noise import ROUNDS

_SOURCE = Path(__file__).with_name("quantized.cpp")
_forward = ParallelKernel(_SOURCE, "experts_quantized_forward", "ppppppppppp iiiiiiii")
_backward = NativeFunction(_SOURCE, "experts_quantized_backward", "pppppppppppppppppp iiiiiiiiiiii")
_OPERANDS: tuple[Product, ...] = ("fprop", "fprop", "dgrad", "wgrad", "dgrad", "wgrad")
_CODES = {"nearest": 1, "stochastic": 2, "ms_eden": 3, "four_over_six": 4}
"""`Format` of quantized.cpp; 0 for operands that are not rounded."""
_signs = torch.tensor(SIGNS, dtype=torch.float32)


def routed_experts_quantized_native(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    quantization: ExpertsQuantization,
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    order = order_rows(indices.contiguous(), up.shape[0])
    return _Experts.apply(
        contiguous_rows(x), weights.contiguous(), up, down, order, activation, quantization.here()
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        order: Order,
        activation: Activation,
        quantization: ExpertsQuantization,
    ) -> Tensor:
        is_kept = any(ctx.needs_input_grad)
        kept = x.new_empty(weights.numel(), up.shape[1]) if is_kept else None
        outputs, y = x.new_empty(weights.numel(), x.shape[1]), x.new_empty(x.shape)
        formats = quantization.up.formats
        rounded = _fprop(up, quantization.up), _fprop(down, quantization.down)
        counts = _counts(quantization)
        _forward(
            x, weights, *rounded, *order, kept,
            outputs, y, counts, *sizes_of(weights, down, activation), x.stride(0),
            _code(formats.fprop), work=weights.numel() * up.shape[1] * up.shape[2],
        )  # fmt: skip
        _add(quantization, counts)
        matrices = rounded if formats.shares_weight else (up, down)
        ctx.save_for_backward(x, weights, *matrices, kept, *order)
        ctx.quantization, ctx.activation = quantization, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, kept, *order = ctx.saved_tensors
        q = ctx.quantization
        needs_x, _, needs_up, needs_down, *_ = ctx.needs_input_grad
        grad = contiguous_rows(grad)
        rows = x.new_empty(weights.numel(), x.shape[1]) if needs_x else None
        dx = x.new_empty(x.shape) if needs_x else None
        d_weights = torch.empty_like(weights)
        d_up = torch.empty(up.shape) if needs_up else None
        d_down = torch.empty(down.shape) if needs_down else None
        dgrad, wgrad = q.up.formats.dgrad, q.up.formats.wgrad
        signs = _signs if wgrad is not None and wgrad.first.hadamard else None
        noise = torch.tensor(
            [[b.seed, b.stream] for own in (q.down, q.up) for b in _bits(own, order[0])]
        )
        features = torch.arange(max(x.shape[1], up.shape[1]))
        counts = _counts(q)
        _backward(
            x, weights, _dgrad(up, q.up), _dgrad(down, q.down), *order, kept, grad, rows, dx,
            d_weights, d_up, d_down, signs, noise, features, counts,
            *sizes_of(weights, down, ctx.activation), x.stride(0), grad.stride(0),
            _code(dgrad), _code(wgrad), ROUNDS, q.up.position.first_token * weights.shape[1],
        )  # fmt: skip
        _add(q, counts)
        return dx, d_weights, d_up, d_down, None, None, None


def _code(operands: Operands | None) -> int:
    """How the operand of activations or gradients is rounded."""
    if operands is None:
        return 0
    first = operands.first
    return _CODES[first.rounding if first.scales == "max" else first.scales]


def _bits(q: ProductQuantization, rows: Tensor) -> list[RandomBits]:
    """The noise of the backward products with one matrix, in the order of quantized.cpp.

    The places of rows are given apart; MS-EDEN along tokens rounds scales of features, which no
    token names. Its signs, and that noise, are the same for all experts.
    """
    wgrad = q.formats.wgrad
    is_eden = wgrad is not None and wgrad.first.rounding == "ms_eden"
    of_wgrad = None if is_eden else rows
    return [
        q.noise("dgrad signs").bits,
        q.noise("dgrad dy", rows).bits,
        q.noise("wgrad signs").bits,
        q.noise("wgrad dy", of_wgrad).bits,
        q.noise("wgrad x", of_wgrad).bits,
    ]


def _counts(q: ExpertsQuantization) -> Tensor | None:
    """Flushed and all values of each operand of quantized.cpp, in a step that measures."""
    return None if q.up.position.flushed is None else torch.zeros(6, 2, dtype=torch.int64)


def _add(q: ExpertsQuantization, counts: Tensor | None) -> None:
    if counts is not None:
        for product, (flushed, total) in zip(_OPERANDS, counts, strict=True):
            q.up.count_flushed(product, flushed, int(total))


def _fprop(matrices: Tensor, q: ProductQuantization) -> Tensor:
    """The matrices as fprop multiplies with them."""
    formats = q.formats.fprop
    if formats is None:
        return matrices.contiguous()
    return q.stacked_values("fprop", "w", formats.second, matrices)


def _dgrad(matrices: Tensor, q: ProductQuantization) -> Tensor:
    """The matrices as dgrad multiplies with them; values that it shares with fprop are given."""
    if q.formats.shares_weight or q.formats.dgrad is None:
        return matrices.contiguous()
    if q.formats.dgrad.second.is_random:  # right on the average for fprop's values
        matrices = _fprop(matrices, q)
    return q.stacked_values("dgrad", "w", q.formats.dgrad.second, matrices)
