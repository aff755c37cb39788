"""Products with a quantized or narrower weight, which is widened before the product."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nemotron3.ops.linear.reference import linear_reference
from nemotron3.ops.weights import QuantizedWeight


def linear_dequantized_reference(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T; shapes as in `nemotron3.ops.linear.api.linear`."""
    return linear_reference(x, weight.dequantize(x.dtype))


def linear_dequantized_torch(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T; shapes as in `nemotron3.ops.linear.api.linear`."""
    return _Linear.apply(x, weight)


def linear_narrow_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; shapes as in `nemotron3.ops.linear.api.linear`."""
    return linear_reference(x, weight.to(x.dtype))


def linear_narrow_torch(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; shapes as in `nemotron3.ops.linear.api.linear`."""
    return F.linear(x, weight.to(x.dtype))


class _Linear(torch.autograd.Function):
    """A product that keeps the quantized weight for the backward pass, not the dequantized one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.dequantize(grad.dtype), None
