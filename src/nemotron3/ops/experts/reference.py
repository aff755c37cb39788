"""Routed experts, token by token: y_t = sum_i w_ti down_i act(up_i x_t) over chosen experts i."""

import torch
from torch import Tensor

from nemotron3.ops.experts.activations import Activation, activate


def routed_experts_reference(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Apply each token's experts in turn; shapes as in
    `nemotron3.ops.experts.api.routed_experts`."""
    outputs = []
    for x_t, experts, w in zip(x, indices.tolist(), weights, strict=True):
        parts = [
            w[slot] * (down[expert] @ activate(up[expert] @ x_t, activation))
            for slot, expert in enumerate(experts)
        ]
        outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs)
