"""Routed experts as one matrix product per expert over the tokens that chose it.

Tokens are gathered in the order of their experts, so that each expert reads a contiguous block.
Three decisions determine the rest:

* The router's weight multiplies the activation, not the output, as in Megatron. The result is the
  same, and the backward pass then needs neither the outputs nor a second product for the weight.
* Both directions gather rows by index and add a token's k results in the order of its slots. There
  is no scatter-add, so the sum never depends on thread timing.
* Every block is padded to a multiple of `ROW_TILE` rows. Matrix libraries switch kernels, and with
  them the order of summation, at one, two or three rows. With padding a token's result does not
  depend on how many others chose the same expert, bit for bit.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nemotron3.ops.experts.activations import Activation, activate, activation_backward

ROW_TILE = 4


def routed_experts_torch(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Apply one expert after another; shapes as in `nemotron3.ops.experts.api.routed_experts`."""
    slot, bounds = _assign_slots(indices, up.shape[0])
    return _RoutedExperts.apply(x, weights, up, down, slot, bounds, activation)


def _assign_slots(indices: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The row of the sorted buffer for each (token, choice), and where each expert's rows begin."""
    chosen = indices.flatten()
    counts = torch.bincount(chosen, minlength=num_experts)
    padded = (counts + ROW_TILE - 1) // ROW_TILE * ROW_TILE
    ends = padded.cumsum(0)
    order = chosen.argsort(stable=True)
    expert = chosen[order]
    rank = torch.arange(len(chosen), device=chosen.device) - (counts.cumsum(0) - counts)[expert]
    slot = torch.empty_like(chosen)
    slot[order] = (ends - padded)[expert] + rank
    return slot, [0, *ends.tolist()]


def _product(rows: Tensor, matrices: Tensor, bounds: list[int]) -> Tensor:
    """rows[block e] @ matrices[e] for every expert e."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for matrix, (start, end) in zip(matrices.unbind(), pairwise(bounds), strict=True):
        if end > start:
            torch.mm(rows[start:end], matrix, out=out[start:end])
    return out


def _weight_gradient(grad: Tensor, rows: Tensor, bounds: list[int]) -> Tensor:
    """grad[block e]^T rows[block e] for every expert e; zero for an expert without tokens."""
    out = grad.new_empty(len(bounds) - 1, grad.shape[1], rows.shape[1])
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(grad[start:end].T, rows[start:end], out=out[expert])
        else:
            out[expert].zero_()
    return out


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        slot: Tensor,
        bounds: list[int],
        activation: Activation,
    ) -> Tensor:
        tokens, k = weights.shape
        # Padding rows hold token 0 with weight 0: they are computed and never read.
        token_of_slot = slot.new_zeros(bounds[-1])
        token_of_slot[slot] = torch.arange(tokens, device=slot.device).repeat_interleave(k)
        slot_weights = weights.new_zeros(bounds[-1], 1)
        slot_weights[slot, 0] = weights.flatten()
        h = _product(x[token_of_slot], up.transpose(1, 2), bounds)
        a = activate(h, activation) * slot_weights
        y = _product(a, down.transpose(1, 2), bounds)
        ctx.save_for_backward(x, up, down, slot, token_of_slot, slot_weights, h)
        ctx.bounds, ctx.activation = bounds, activation
        return y[slot].unflatten(0, (tokens, k)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, slot, token_of_slot, slot_weights, h = ctx.saved_tensors
        bounds = ctx.bounds
        tokens, k = x.shape[0], slot.shape[0] // x.shape[0]
        dy = grad[token_of_slot]
        da = _product(dy, down, bounds)
        unweighted = activate(h, ctx.activation)
        d_weights = (da * unweighted).sum(-1)[slot].unflatten(0, (tokens, k))
        _, _, needs_up, needs_down, *_ = ctx.needs_input_grad
        a = unweighted.mul_(slot_weights)
        d_down = _weight_gradient(dy, a, bounds) if needs_down else None
        dh = activation_backward(h, da.mul_(slot_weights), ctx.activation)
        d_up = _weight_gradient(dh, x[token_of_slot], bounds) if needs_up else None
        dx = _product(dh, up, bounds)[slot].unflatten(0, (tokens, k)).sum(1)
        return dx, d_weights, d_up, d_down, None, None, None
