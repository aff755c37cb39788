"""Routed experts as two dense products for each expert, of weights in a number format.

Training uses it where a fused operation would keep the dequantized matrices of all experts for the
backward pass, and for low-rank changes, whose gradients are those of dense products. Of the codes
one matrix, or a tile of it, is dequantized at a time.

The router's weight multiplies the hidden units. A token's results are added in the order of its
choices, and rows are gathered by permutations, so no sum depends on the timing of threads.
"""

from functools import partial

import torch
from torch import Tensor

from nemotron3.ops.backends import Backend
from nemotron3.ops.experts.activations import Activation, activate
from nemotron3.ops.experts.quantized import order_by_expert, parts_of_experts, summed
from nemotron3.ops.linear import linear, linear_low_rank
from nemotron3.ops.weights import LowRankWeight, QuantizedWeight, Weight

FrozenWeight = QuantizedWeight | LowRankWeight
"""Of all experts: a quantized weight, with or without a change."""


def routed_experts_by_expert(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: FrozenWeight,
    down: FrozenWeight,
    activation: Activation,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`; `backend` is that of products."""
    order, bounds = order_by_expert(indices, up.shape[0])
    tokens, choices = indices.shape
    xs = x.unsqueeze(1).expand(tokens, choices, x.shape[1]).flatten(0, 1)[order]
    scales = weights.flatten()[order].unsqueeze(1)
    ups, downs = _matrices(up), _matrices(down)
    results: list[Tensor] = []
    for expert, part in parts_of_experts(bounds):
        h = _product(xs[part], ups[expert], backend)
        a = activate(h, activation) * scales[part]
        results.append(_product(a, downs[expert], backend))
    return summed(torch.cat(results), order, weights.shape)


routed_experts_by_expert_reference = partial(routed_experts_by_expert, backend="reference")
routed_experts_by_expert_torch = partial(routed_experts_by_expert, backend="torch")
"""With products of one backend."""


def _matrices(stacked: FrozenWeight) -> list[QuantizedWeight] | list[LowRankWeight]:
    return stacked.unbind() if isinstance(stacked, LowRankWeight) else list(stacked)


def _product(x: Tensor, matrix: Weight | LowRankWeight, backend: Backend) -> Tensor:
    if isinstance(matrix, LowRankWeight):
        return linear_low_rank(x, matrix, backend=backend)
    return linear(x, matrix, backend=backend)
