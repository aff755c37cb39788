"""A weight with a low-rank change, W + scale B A (Hu et al., *LoRA*, arXiv 2106.09685).

Products multiply with the sum of a plain weight, which they ask for (ops/products.py). The other
form, x W^T + scale (x A^T) B^T, saves the gradient of the whole matrix, but it adds up in another
order than a model that the change was merged into, and every fused operation of stacked experts
would need a second one. So training computes with the very matrices that a served model has
(docs/decisions/0015-lora-computes-with-merged-weights.md).

A weight in a narrow number format has no such sum: it would be the unpacked matrix. There both
training and the engine compute the other form, with the codes as they are (QLoRA, arXiv 2305.14314;
docs/decisions/0021-adapters-stand-beside-quantized-weights.md).
"""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.models.initial_values import Constant, Uniform
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.weights import (
    ComputedWeight,
    LowRankWeight,
    QuantizedWeight,
    Weight,
    add_low_rank,
)


class LowRank(NamedTuple):
    """A change of a matrix [out, in], or of one for each expert."""

    A: Float[Tensor, "*expert rank d_in"]
    B: Float[Tensor, "*expert d_out rank"]
    scale: float

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, or matrices, that it changes."""
        return torch.Size((*self.B.shape[:-1], self.A.shape[-1]))

    def added_to(
        self, weight: Weight, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*expert d_out d_in"]:
        """W + scale B A, added up in float32 at least, in `dtype`; None leaves it as it was added.

        The gradients are those of the change alone.
        """
        own = weight.dtype if isinstance(weight, Tensor) else torch.float32
        wide = torch.promote_types(own, torch.float32)
        return add_low_rank(weight, self.A, self.B, self.scale, dtype=dtype or wide)


class AdaptedWeight(DeclaredModule, ComputedWeight):
    """A frozen weight and its low-rank change, which is trained; it stands in for the parameter.

    A is random and B is 0, so the change is nothing at first.
    """

    base: nn.Parameter | QuantizedWeight
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, base: nn.Parameter | QuantizedWeight, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        base.requires_grad_(False)
        self.base = base
        *experts, d_out, d_in = base.shape
        init = Uniform(-(d_in**-0.5), d_in**-0.5)
        with base.device:
            self.declare("A", (*experts, rank, d_in), init=init, decays=True, keep_float32=True)
            init = Constant(0.0)
            self.declare("B", (*experts, d_out, rank), init=init, decays=True, keep_float32=True)

    @classmethod
    @torch.no_grad()
    def frozen(cls, base: QuantizedWeight, change: LowRank) -> Self:
        """A quantized weight with a copy of a change that is not trained."""
        weight = cls(base, rank=change.A.shape[-2], scale=change.scale)
        for own, given in ((weight.A, change.A), (weight.B, change.B)):
            own.requires_grad_(False).copy_(given)
        return weight

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, or matrices."""
        return self.base.shape

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.base.device

    @property
    def change(self) -> LowRank:
        """The change, in the memory of its parameters."""
        return LowRank(self.A, self.B, self.scale)

    def operand(self, dtype: torch.dtype) -> Tensor | LowRankWeight:
        """The changed weight, or the two parts of one whose base is quantized."""
        if isinstance(self.base, QuantizedWeight):
            return LowRankWeight(self.base, self.A, self.B, self.scale)
        return self.value(dtype)

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The changed weight, with gradients for the change alone."""
        return self.change.added_to(self.base, dtype)

    def extra_repr(self) -> str:
        """Its shape and rank."""
        return f"{' x '.join(map(str, self.shape))}, rank {self.A.shape[-2]}"
