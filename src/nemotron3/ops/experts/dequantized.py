"""Routed experts with quantized or narrower weights, which are widened before the products."""

import torch
from torch import Tensor

from nemotron3.ops.backends import Kernel
from nemotron3.ops.experts.activations import Activation
from nemotron3.ops.experts.reference import routed_experts_reference
from nemotron3.ops.experts.torch import routed_experts_torch
from nemotron3.ops.weights import Weight

_NATIVE = Kernel("nemotron3.ops.experts.native", "routed_experts_native")
_TRITON = Kernel("nemotron3.ops.experts.triton", "routed_experts_triton")


def _wide(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def routed_experts_dequantized_reference(
    x: Tensor, indices: Tensor, weights: Tensor, up: Weight, down: Weight, activation: Activation
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    matrices = _wide(up, x.dtype), _wide(down, x.dtype)
    return routed_experts_reference(x, indices, weights, *matrices, activation)


def routed_experts_dequantized_torch(
    x: Tensor, indices: Tensor, weights: Tensor, up: Weight, down: Weight, activation: Activation
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    matrices = _wide(up, x.dtype), _wide(down, x.dtype)
    return routed_experts_torch(x, indices, weights, *matrices, activation)


def routed_experts_dequantized_native(
    x: Tensor, indices: Tensor, weights: Tensor, up: Weight, down: Weight, activation: Activation
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    matrices = _wide(up, x.dtype), _wide(down, x.dtype)
    return _NATIVE.loaded(x, indices, weights, *matrices, activation)


def routed_experts_dequantized_triton(
    x: Tensor, indices: Tensor, weights: Tensor, up: Weight, down: Weight, activation: Activation
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    matrices = _wide(up, x.dtype), _wide(down, x.dtype)
    return _TRITON.loaded(x, indices, weights, *matrices, activation)
