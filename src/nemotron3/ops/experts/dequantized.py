"""Routed experts with quantized or narrower weights, which are widened before the products.

Where gradients are needed the dequantized matrices would be kept for the backward pass, those of
all layers at once; so there it goes expert by expert. Bfloat16 matrices are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Implementations, Kernel, load
from nemotron3.ops.experts.activations import Activation
from nemotron3.ops.experts.by_expert import FrozenWeight, routed_experts_by_expert
from nemotron3.ops.experts.reference import routed_experts_reference
from nemotron3.ops.experts.torch import routed_experts_torch

PLAIN: Implementations = {
    "reference": routed_experts_reference,
    "torch": routed_experts_torch,
    "native": Kernel("nemotron3.ops.experts.native", "routed_experts_native", native.FLOATS),
    "triton": Kernel("nemotron3.ops.experts.triton", "routed_experts_triton"),
}
"""Those with matrices in the dtype of their activations."""


def _dequantized(
    name: str,
    by_expert: Backend | None,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: FrozenWeight,
    down: FrozenWeight,
    activation: Activation,
) -> Tensor:
    """Of codes, by the plain implementation `name`; by products on `by_expert` for gradients."""
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    if by_expert is not None and is_trained:
        return routed_experts_by_expert(
            x, indices, weights.to(x.dtype), up, down, activation, backend=by_expert
        )
    matrices = up.dequantize(x.dtype), down.dequantize(x.dtype)
    return load(PLAIN, name)(x, indices, weights, *matrices, activation)


def _narrow(
    name: str,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """Of float32 with bfloat16 matrices, by the plain implementation `name`."""
    return load(PLAIN, name)(x, indices, weights, up.to(x.dtype), down.to(x.dtype), activation)


_Implementation = Callable[..., Any]  # operands as in `nemotron3.ops.experts.api.routed_experts`
routed_experts_dequantized_reference: _Implementation = partial(_dequantized, "reference", None)
routed_experts_dequantized_torch: _Implementation = partial(_dequantized, "torch", "torch")
routed_experts_dequantized_native: _Implementation = partial(_dequantized, "native", "auto")
routed_experts_dequantized_triton: _Implementation = partial(_dequantized, "triton", "auto")
routed_experts_narrow_reference: _Implementation = partial(_narrow, "reference")
routed_experts_narrow_torch: _Implementation = partial(_narrow, "torch")
routed_experts_narrow_triton: _Implementation = partial(_narrow, "triton")
