"""Routed experts with quantized or narrower weights, which are widened before the products.

Where gradients are needed the dequantized matrices would be kept for the backward pass, those of
all layers at once; so there it goes expert by expert. Bfloat16 matrices are kept.
"""

import torch
from torch import Tensor

from nemotron3.ops.backends import Kernel
from nemotron3.ops.experts.activations import Activation
from nemotron3.ops.experts.by_expert import FrozenWeight, routed_experts_by_expert
from nemotron3.ops.experts.reference import routed_experts_reference
from nemotron3.ops.experts.torch import routed_experts_torch

_NATIVE = Kernel("nemotron3.ops.experts.native", "routed_experts_native")
_TRITON = Kernel("nemotron3.ops.experts.triton", "routed_experts_triton")


def routed_experts_dequantized_reference(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: FrozenWeight,
    down: FrozenWeight,
    activation: Activation,
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    matrices = up.dequantize(x.dtype), down.dequantize(x.dtype)
    return routed_experts_reference(x, indices, weights, *matrices, activation)


def routed_experts_dequantized_torch(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: FrozenWeight,
    down: FrozenWeight,
    activation: Activation,
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    if _has_gradients(x, weights):
        return routed_experts_by_expert(x, indices, weights, up, down, activation, backend="torch")
    matrices = up.dequantize(x.dtype), down.dequantize(x.dtype)
    return routed_experts_torch(x, indices, weights, *matrices, activation)


def routed_experts_dequantized_native(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: FrozenWeight,
    down: FrozenWeight,
    activation: Activation,
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    if _has_gradients(x, weights):
        weights = weights.to(x.dtype)
        return routed_experts_by_expert(x, indices, weights, up, down, activation, backend="auto")
    matrices = up.dequantize(x.dtype), down.dequantize(x.dtype)
    return _NATIVE.loaded(x, indices, weights, *matrices, activation)


def routed_experts_dequantized_triton(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: FrozenWeight,
    down: FrozenWeight,
    activation: Activation,
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    if _has_gradients(x, weights):
        return routed_experts_by_expert(x, indices, weights, up, down, activation, backend="auto")
    matrices = up.dequantize(x.dtype), down.dequantize(x.dtype)
    return _TRITON.loaded(x, indices, weights, *matrices, activation)


def routed_experts_narrow_reference(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Of float32 with bfloat16 matrices."""
    matrices = up.to(x.dtype), down.to(x.dtype)
    return routed_experts_reference(x, indices, weights, *matrices, activation)


def routed_experts_narrow_torch(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Of float32 with bfloat16 matrices."""
    matrices = up.to(x.dtype), down.to(x.dtype)
    return routed_experts_torch(x, indices, weights, *matrices, activation)


def routed_experts_narrow_triton(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Of float32 with bfloat16 matrices."""
    matrices = up.to(x.dtype), down.to(x.dtype)
    return _TRITON.loaded(x, indices, weights, *matrices, activation)


def _has_gradients(x: Tensor, weights: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
