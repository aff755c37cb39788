"""Dense products whose operands are rounded, and the gradients of such products.

Rounding has no derivative, so gradients are those of the product with the rounded weight, as in
Transformer Engine (the straight-through estimator). The formats say what becomes of each operand
(ops/low_precision); the products are ordinary ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nemotron3.ops.backends import Backend
from nemotron3.ops.low_precision import ProductQuantization


@dataclass(frozen=True)
class Products:
    """The three products of one backend, and the backend of rounding."""

    forward: Callable[[Tensor, Tensor], Tensor]
    """x W^T."""
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    """dy W."""
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    """dy^T x."""
    rounding: Backend


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    return dy @ weight


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return dy.T @ x


REFERENCE = Products(F.linear, _input_gradient, _weight_gradient, "reference")
TORCH = Products(F.linear, _input_gradient, _weight_gradient, "auto")


def linear_quantized_reference(
    x: Tensor, weight: Tensor, sizes: Sequence[int], quantization: ProductQuantization
) -> tuple[Tensor, ...]:
    """Shapes as in `nemotron3.ops.linear.api.linear_parts`."""
    return linear_quantized(x, weight, sizes, quantization, REFERENCE)


def linear_quantized_torch(
    x: Tensor, weight: Tensor, sizes: Sequence[int], quantization: ProductQuantization
) -> tuple[Tensor, ...]:
    """Shapes as in `nemotron3.ops.linear.api.linear_parts`."""
    return linear_quantized(x, weight, sizes, quantization, TORCH)


def linear_quantized(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    quantization: ProductQuantization,
    products: Products,
) -> tuple[Tensor, ...]:
    """Parts of x W^T by these products."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = _Linear.apply(rows, weight, quantization.here(), products)
    return y.view(*x.shape[:-1], y.shape[1]).split(sizes, dim=-1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quantization: ProductQuantization, products: Products
    ) -> Tensor:
        left, right = fprop_operands(x, weight, quantization, products.rounding)
        ctx.save_for_backward(x, right if quantization.formats.shares_weight else weight)
        ctx.quantization, ctx.products = quantization, products
        return products.forward(left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        q, products = ctx.quantization, ctx.products
        rows = q.rows_of_tokens(len(grad), grad.device)
        dx = dw = None
        if needs_input:
            operands = dgrad_operands(grad, weight, q, rows, products.rounding)
            dx = products.input_gradient(*operands)
        if needs_weight:
            operands = wgrad_operands(grad, x, q, rows, products.rounding)
            dw = products.weight_gradient(*operands)
        return dx, dw, None, None


def fprop_operands(
    x: Tensor, weight: Tensor, q: ProductQuantization, backend: Backend
) -> tuple[Tensor, Tensor]:
    """x and W of y = x W^T."""
    formats = q.formats.fprop
    if formats is None:
        return x, weight
    left = q.values("fprop", "x", formats.first, x, backend=backend)
    return left, q.values("fprop", "w", formats.second, weight, backend=backend)


def dgrad_operands(
    dy: Tensor, weight: Tensor, q: ProductQuantization, rows: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """dy and W of dx = dy W; where both products share values of W, they are given."""
    formats, before = q.formats.dgrad, q.formats.fprop
    if formats is None:
        return dy, weight
    dy = q.values("dgrad", "dy", formats.first, dy, rows=rows, backend=backend)
    if q.formats.shares_weight:
        return dy, weight
    if formats.second.is_random and before is not None:  # right on the average for fprop's values
        weight = q.values("fprop", "w", before.second, weight, backend=backend)
    return dy, q.values("dgrad", "w", formats.second, weight, backend=backend)


def wgrad_operands(
    dy: Tensor, x: Tensor, q: ProductQuantization, rows: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """dy and x of dW = dy^T x, with rows of zeros' places where the tokens are no whole block."""
    formats = q.formats.wgrad
    if formats is None:
        return dy, x
    dy = q.values("wgrad", "dy", formats.first, dy, rows=rows, backend=backend)
    return dy, q.values("wgrad", "x", formats.second, x, rows=rows, backend=backend)
