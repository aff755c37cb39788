"""The products of a model with its weights: the one place that depends on the number format.

All dense and grouped products go through here, those of the router and the output layer included,
in forward passes, backward passes and recorded steps. A weight is a tensor, cast to the dtype of
the activations, or a `QuantizedWeight`, which names its own kernels (ops/weights).
"""

from collections.abc import Sequence
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.experts import Activation, routed_experts
from nemotron3.ops.linear import linear, linear_parts
from nemotron3.ops.weights import Weight


@overload
def dense(x: Tensor, weight: Weight) -> Tensor: ...


@overload
def dense(x: Tensor, weight: Weight, sizes: Sequence[int]) -> tuple[Tensor, ...]: ...


def dense(
    x: Float[Tensor, "*batch d_in"], weight: Weight, sizes: Sequence[int] | None = None
) -> Float[Tensor, "*batch d_out"] | tuple[Float[Tensor, "*batch d_part"], ...]:
    """x W^T in the dtype of `x`; with `sizes`, split into parts of these numbers of columns."""
    weight = _operand(weight, x.dtype)
    return linear(x, weight) if sizes is None else linear_parts(x, weight, sizes)


def grouped(
    x: Float[Tensor, "tokens d_in"],
    indices: Int[Tensor, "tokens choice"],
    weights: Float[Tensor, "tokens choice"],
    up: Weight,
    down: Weight,
    *,
    activation: Activation,
) -> Float[Tensor, "tokens d_in"]:
    """Weighted sum of each token's experts, in the dtype of `x` (`ops.experts`)."""
    up, down = _operand(up, x.dtype), _operand(down, x.dtype)
    return routed_experts(x, indices, weights, up, down, activation=activation)


def _operand(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight
