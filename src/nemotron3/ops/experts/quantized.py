"""Routed experts whose products have rounded operands, expert by expert.

Each expert is a product of its own: its tokens, its hidden units and its matrices have a tensor
scale each, so an expert's result depends on no other. The hidden units are rounded after the
router's weight is multiplied in. Rows are those of the expert's tokens, in the order of tokens; a
(token, choice) has the place token * choices + choice in the noise.

It is the definition of the compiled code (native_quantized.py), and it runs on a GPU.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.experts.activations import Activation, activate, activation_backward
from nemotron3.ops.linear.quantized import REFERENCE, TORCH, Products, dgrad, fprop, wgrad
from nemotron3.ops.low_precision import ExpertsQuantization


def routed_experts_quantized(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    quantization: ExpertsQuantization,
    *,
    products: Products,
) -> Tensor:
    """Shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    return _Experts.apply(x, weights, up, down, indices, activation, quantization.here(), products)


routed_experts_quantized_reference = partial(routed_experts_quantized, products=REFERENCE)
routed_experts_quantized_torch = partial(routed_experts_quantized, products=TORCH)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - operands, and how they are multiplied
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        indices: Tensor,
        activation: Activation,
        quantization: ExpertsQuantization,
        products: Products,
    ) -> Tensor:
        order, bounds = order_by_expert(indices, len(up))
        choices = indices.shape[1]
        xs, scales = x[order // choices], weights.flatten()[order].unsqueeze(1)
        h, y = xs.new_empty(len(xs), up.shape[1]), torch.empty_like(xs)
        is_shared = quantization.up.formats.shares_weight  # then dgrad has the values of fprop
        kept_up, kept_down = (torch.empty_like(t) if is_shared else t for t in (up, down))
        for expert, part in parts_of_experts(bounds):
            h[part], own = fprop(xs[part], up[expert], quantization.up, products)
            a = activate(h[part], activation) * scales[part]
            y[part], own_down = fprop(a, down[expert], quantization.down, products)
            if is_shared:
                kept_up[expert], kept_down[expert] = own, own_down
        ctx.save_for_backward(x, weights, kept_up, kept_down, order, h)
        ctx.bounds, ctx.choices, ctx.activation = bounds, choices, activation
        ctx.quantization, ctx.products = quantization, products
        return summed(y, order, weights.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, order, h = ctx.saved_tensors
        q, products, activation = ctx.quantization, ctx.products, ctx.activation
        tokens = order // ctx.choices
        xs, dy = x[tokens], grad[tokens]
        scales = weights.flatten()[order].unsqueeze(1)
        places = order + q.up.position.first_token * ctx.choices
        _, _, needs_up, needs_down, *_ = ctx.needs_input_grad
        d_up = torch.zeros_like(up) if needs_up else None
        d_down = torch.zeros_like(down) if needs_down else None
        dxs, d_scales = torch.empty_like(xs), torch.empty_like(scales)
        for expert, part in parts_of_experts(ctx.bounds):
            rows = places[part]
            da = dgrad(dy[part], down[expert], q.down, rows, products)
            a = activate(h[part], activation)
            d_scales[part] = (da * a).sum(-1, keepdim=True)
            if d_down is not None:
                d_down[expert] = wgrad(dy[part], a * scales[part], q.down, rows, products)
            dh = activation_backward(h[part], da, activation) * scales[part]
            if d_up is not None:
                d_up[expert] = wgrad(dh, xs[part], q.up, rows, products)
            dxs[part] = dgrad(dh, up[expert], q.up, rows, products)
        d_weights = torch.empty_like(weights).flatten()
        d_weights[order] = d_scales.squeeze(1)
        dx = summed(dxs, order, weights.shape)
        return dx, d_weights.view_as(weights), d_up, d_down, None, None, None, None


def order_by_expert(indices: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """The token * choices + choice of each row, by expert, and where each expert's rows begin."""
    chosen = indices.flatten()
    counts = torch.bincount(chosen, minlength=experts)
    return chosen.argsort(stable=True), [0, *counts.cumsum(0).tolist()]


def parts_of_experts(bounds: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and these."""
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield expert, slice(start, end)


def summed(rows: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """The sum of each token's rows, in the order of its choices."""
    placed = torch.empty_like(rows)
    placed[order] = rows
    placed = placed.unflatten(0, shape)
    total = placed[:, 0]
    for choice in range(1, shape[1]):
        total = total + placed[:, choice]
    return total
