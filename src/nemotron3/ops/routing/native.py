"""Choosing experts in C++ (see native.cpp)."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import NativeFunction, ParallelKernel
from nemotron3.ops.routing.reference import Scoring

_SOURCE = Path(__file__).with_name("native.cpp")
_forward = ParallelKernel(_SOURCE, "route", "ppppp iiiiiii f")
_backward = NativeFunction(_SOURCE, "route_backward", "pppp iiiii f")

_Routed = tuple[Tensor, Tensor, Tensor]


class _Rule(NamedTuple):
    """How scores become weights, as arguments of the compiled functions."""

    is_softmax: int
    normalise: int
    scale: float


def route_native(
    logits: Tensor,
    bias: Tensor,
    indices: Tensor | None,
    *,
    choices: int,
    scoring: Scoring,
    normalise: bool,
    scale: float,
) -> _Routed:
    """Shapes as in `nemotron3.ops.routing.api.route`."""
    rule = _Rule(int(scoring == "softmax"), int(normalise), scale)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Route.apply(logits, bias.detach(), indices, choices, rule)
    return _choose(logits, bias, indices, choices, rule)


def _choose(
    logits: Tensor, bias: Tensor, given: Tensor | None, choices: int, rule: _Rule
) -> _Routed:
    logits, bias = contiguous_rows(logits), bias.contiguous()
    (tokens, experts), scores = logits.shape, logits.new_empty(logits.shape)
    weights = logits.new_empty(tokens, choices)
    indices = torch.empty_like(weights, dtype=torch.int64) if given is None else given.contiguous()
    _forward(
        logits, bias, indices, weights, scores, tokens, experts, choices, logits.stride(0),
        int(given is not None), *rule, work=logits.numel() * choices,
    )  # fmt: skip
    return indices, weights, scores


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor, given: Tensor | None, choices: int, rule: _Rule
    ) -> _Routed:
        indices, weights, scores = _choose(logits, bias, given, choices, rule)
        ctx.save_for_backward(indices, scores)
        ctx.rule = rule
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return indices, weights, scores

    @staticmethod
    def backward(
        ctx: Any, _: None, d_weights: Tensor | None, d_scores: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        indices, scores = ctx.saved_tensors
        (tokens, choices), experts = indices.shape, scores.shape[1]
        d_logits = torch.zeros_like(scores)
        if d_scores is not None:
            d_logits.copy_(d_scores)
        grad = scores.new_zeros(tokens, choices) if d_weights is None else d_weights.contiguous()
        _backward(indices, scores, grad, d_logits, tokens, experts, choices, *ctx.rule)
        return d_logits, None, None, None, None
