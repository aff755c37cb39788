"""A weight with a low-rank change, W + scale B A: their sum, or the parts of a product of both.

The sum is added up in float32 at least and rounded once. That takes copies of both summands, which
for the stacked experts of a large model are gigabytes; so sum and gradients are computed in slices
of the first axis (experts, or rows of a single matrix), and of the whole there is only the result.

A weight in a narrow number format is not added up: the sum would be the unpacked matrix. Products
multiply with codes and change apart, x W^T + scale (x A^T) B^T (`LowRankWeight`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.weights.quantized import QuantizedWeight, Weight

SLICE = 1 << 25
"""Elements of a slice at most, where one index of the first axis has no more."""


@dataclass(frozen=True, eq=False)
class LowRankWeight:
    """A quantized weight and its change, each of which a product multiplies with."""

    base: QuantizedWeight
    A: Float[Tensor, "*expert rank d_in"]
    B: Float[Tensor, "*expert d_out rank"]
    scale: float

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, or matrices."""
        return self.base.shape

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.base.device

    @property
    def format(self) -> str:
        """The number format of the weight."""
        return self.base.format

    def unbind(self) -> list["LowRankWeight"]:
        """Those of the single experts."""
        pairs = zip(self.A.unbind(), self.B.unbind(), strict=True)
        return [
            LowRankWeight(base, A, B, self.scale)
            for base, (A, B) in zip(self.base, pairs, strict=True)
        ]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*expert d_out d_in"]:
        """The dequantized weight with its change."""
        return add_low_rank(self.base, self.A, self.B, self.scale, dtype=dtype)


def add_low_rank(
    weight: Weight,
    A: Float[Tensor, "*expert rank d_in"],
    B: Float[Tensor, "*expert d_out rank"],
    scale: float,
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "*expert d_out d_in"]:
    """W + scale B A in `dtype`, with gradients for A and B; the weight is frozen."""
    if isinstance(weight, Tensor):
        weight = weight.detach()
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
        return _AddLowRank.apply(weight, A, B, scale, dtype)
    return _sum(weight, A.detach(), B.detach(), scale, dtype)


def _sum(weight: Weight, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    is_single = len(weight.shape) == 2
    own_dtype = weight.dtype if isinstance(weight, Tensor) else dtype
    wide = torch.promote_types(own_dtype, torch.float32)
    add = torch.addmm if is_single else torch.baddbmm
    slices = list(_slices(weight))

    def added(part: slice) -> Tensor:
        own, own_A = weight[part], A if is_single else A[part]
        values = own.to(wide) if isinstance(own, Tensor) else own.dequantize(wide)
        return add(values, B[part].to(wide), own_A.to(wide), alpha=scale)

    if len(slices) == 1:
        return added(slices[0]).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for part in slices:
        result[part] = added(part)
    return result


def _slices(weight: Weight) -> Iterator[slice]:
    rows = max(1, SLICE // weight.shape[1:].numel())
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Weight, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype
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
