"""Routed experts with quantized matrices and their low-rank changes, which are multiplied apart.

For steps of an engine compiled code has both in one operation. Training goes expert by expert.
"""

from functools import partial

import torch
from torch import Tensor

from nemotron3.ops import native
from nemotron3.ops.backends import Implementations, Kernel
from nemotron3.ops.experts.by_expert import FrozenWeight, routed_experts_by_expert
from nemotron3.ops.experts.dequantized import (
    routed_experts_dequantized_reference,
    routed_experts_dequantized_triton,
)
from nemotron3.ops.weights import CompiledWeight, ExpertMatrices, LowRankWeight
from nemotron3.ops.weights.integer import EXPERTS

_TRAINING: Implementations = {
    "reference": routed_experts_dequantized_reference,
    "torch": partial(routed_experts_by_expert, backend="torch"),
    "native": routed_experts_by_expert,
    "triton": routed_experts_by_expert,
}
_INFERENCE: Implementations = {**_TRAINING, "triton": routed_experts_dequantized_triton}
_COMPILED: Implementations = {
    **_INFERENCE,
    "native": Kernel(
        "nemotron3.ops.experts.native", "routed_experts_low_rank_native", native.FLOATS
    ),
}


def low_rank_implementations(
    x: Tensor, weights: Tensor, up: FrozenWeight, down: FrozenWeight
) -> Implementations:
    """Those that have what is asked for: gradients, and codes that are multiplied as they are."""
    trained = [x, weights]
    for weight in (up, down):
        if isinstance(weight, LowRankWeight):
            trained += [weight.A, weight.B]
    if torch.is_grad_enabled() and any(t.requires_grad for t in trained):
        return _TRAINING
    base = up.base if isinstance(up, LowRankWeight) else up
    if base.activations is not None:
        return {**EXPERTS, "native": _COMPILED["native"]}
    is_compiled = isinstance(base, CompiledWeight | ExpertMatrices)
    return _COMPILED if is_compiled else _INFERENCE
