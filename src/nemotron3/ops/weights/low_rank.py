"""The sum of a weight and a low-rank change, W + scale B A.

It is added up in float32 at least and rounded once. That takes copies of both summands, which for
the stacked experts of a large model are gigabytes; so sum and gradients are computed in slices of
the first axis (experts, or rows of a single matrix), and of the whole there is only the result.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE = 1 << 25
"""Elements of a slice at most, where one index of the first axis has no more."""


def add_low_rank(
    weight: Float[Tensor, "*expert d_out d_in"],
    A: Float[Tensor, "*expert rank d_in"],
    B: Float[Tensor, "*expert d_out rank"],
    scale: float,
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "*expert d_out d_in"]:
    """W + scale B A in `dtype`, with gradients for A and B; the weight is frozen."""
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
        return _AddLowRank.apply(weight.detach(), A, B, scale, dtype)
    return _sum(weight.detach(), A.detach(), B.detach(), scale, dtype)


def _sum(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    add = torch.addmm if weight.dim() == 2 else torch.baddbmm
    slices = list(_slices(weight))

    def added(part: slice) -> Tensor:
        own_A = A if weight.dim() == 2 else A[part]
        return add(weight[part].to(wide), B[part].to(wide), own_A.to(wide), alpha=scale)

    if len(slices) == 1:
        return added(slices[0]).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for part in slices:
        result[part] = added(part)
    return result


def _slices(weight: Tensor) -> Iterator[slice]:
    rows = max(1, SLICE // weight[0].numel())
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.scale = scale
        return _sum(weight, A, B, scale, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, B = ctx.saved_tensors
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        for part in _slices(grad):
            G = grad[part].to(A.dtype)
            if grad.dim() == 2:
                dB[part].addmm_(G, A.T, alpha=ctx.scale)
                dA.addmm_(B[part].T, G, alpha=ctx.scale)
            else:
                dB[part].baddbmm_(G, A[part].mT, alpha=ctx.scale)
                dA[part].baddbmm_(B[part].mT, G, alpha=ctx.scale)
        return None, dA, dB, None, None
