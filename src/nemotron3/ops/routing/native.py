"""Choosing experts in C++ (native.cpp says how); gradients are PyTorch's."""

from pathlib import Path

import torch
from torch import Tensor

from nemotron3.ops.native import TeamFunction, contiguous_rows
from nemotron3.ops.routing.reference import Scoring, route_reference

_route = TeamFunction(Path(__file__).with_name("native.cpp"), "route", "ppppp iiiiii f")


def route_native(
    logits: Tensor, bias: Tensor, *, choices: int, scoring: Scoring, normalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.routing.api.route`."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return route_reference(
            logits, bias, choices=choices, scoring=scoring, normalise=normalise, scale=scale
        )
    logits, bias = contiguous_rows(logits), bias.contiguous()
    (tokens, experts), scores = logits.shape, logits.new_empty(logits.shape)
    weights = logits.new_empty(tokens, choices)
    indices = torch.empty_like(weights, dtype=torch.int64)
    _route(
        logits, bias, indices, weights, scores, tokens, experts, choices, logits.stride(0),
        int(scoring == "softmax"), int(normalise), scale, work=logits.numel() * choices,
    )  # fmt: skip
    return indices, weights, scores
