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
from nemotron3.ops.low_precision.scaled import runs_scaled, scaled_product


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
        y, kept = fprop(x, weight, quantization, products)
        ctx.save_for_backward(x, kept)
        ctx.quantization, ctx.products = quantization, products
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        q, products = ctx.quantization, ctx.products
        rows = q.rows_of_tokens(len(grad), grad.device)
        dx = dgrad(grad, weight, q, rows, products) if needs_input else None
        dw = wgrad(grad, x, q, rows, products) if needs_weight else None
        return dx, dw, None, None


def fprop(
    x: Tensor, weight: Tensor, q: ProductQuantization, products: Products
) -> tuple[Tensor, Tensor]:
    """x W^T, and the weight as `dgrad` takes it: with the values of fprop, if it shares them."""
    formats, backend = q.formats.fprop, products.rounding
    if formats is None:
        return products.forward(x, weight), weight
    if runs_scaled(x, q):
        return scaled_product("fprop", x, weight, formats, q), weight
    left = q.values("fprop", "x", formats.first, x, backend=backend)
    right = q.values("fprop", "w", formats.second, weight, backend=backend)
    return products.forward(left, right), right if q.formats.shares_weight else weight


def dgrad(
    dy: Tensor, weight: Tensor, q: ProductQuantization, rows: Tensor, products: Products
) -> Tensor:
    """dy W; `rows` are the places of tokens in the noise."""
    formats, before, backend = q.formats.dgrad, q.formats.fprop, products.rounding
    if formats is None:
        return products.input_gradient(dy, weight)
    if runs_scaled(dy, q):
        return scaled_product("dgrad", dy, weight, formats, q, rows=rows)
    left = q.values("dgrad", "dy", formats.first, dy, rows=rows, backend=backend)
    if q.formats.shares_weight:
        return products.input_gradient(left, weight)
    if formats.second.is_random and before is not None:  # right on the average for fprop's values
        weight = q.values("fprop", "w", before.second, weight, backend=backend)
    right = q.values("dgrad", "w", formats.second, weight, backend=backend)
    return products.input_gradient(left, right)


def wgrad(
    dy: Tensor, x: Tensor, q: ProductQuantization, rows: Tensor, products: Products
) -> Tensor:
    """dy^T x; `rows` are the places of tokens in the noise."""
    formats, backend = q.formats.wgrad, products.rounding
    if formats is None:
        return products.weight_gradient(dy, x)
    if runs_scaled(dy, q):
        return scaled_product("wgrad", dy, x, formats, q)
    left = q.values("wgrad", "dy", formats.first, dy, rows=rows, backend=backend)
    right = q.values("wgrad", "x", formats.second, x, rows=rows, backend=backend)
    return products.weight_gradient(left, right)
