"""A weight with a low-rank change, W + scale B A (Hu et al., *LoRA*, arXiv 2106.09685).

Products multiply with the sum, which they ask for (ops/products.py). The other form,
x W^T + scale (x A^T) B^T, saves the gradient of the whole matrix, but it adds up in another order
than a model that the change was merged into, and every fused operation of stacked experts would
need a second one. So training computes with the very matrices that a served model has
(docs/decisions/0015-lora-computes-with-merged-weights.md).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.models.initial_values import Constant, Uniform
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.weights import ComputedWeight, add_low_rank


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
        self, weight: Float[Tensor, "*expert d_out d_in"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*expert d_out d_in"]:
        """W + scale B A, added up in float32 at least, in `dtype`; None leaves it as it was added.

        The gradients are those of the change alone.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        return add_low_rank(weight, self.A, self.B, self.scale, dtype=dtype or wide)


class AdaptedWeight(DeclaredModule, ComputedWeight):
    """A frozen weight and its low-rank change, which is trained; it stands in for the parameter.

    A is random and B is 0, so the change is nothing at first.
    """

    base: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, base: nn.Parameter, *, rank: int, scale: float) -> None:
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

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The changed weight, with gradients for the change alone."""
        return self.change.added_to(self.base, dtype)

    def extra_repr(self) -> str:
        """Its shape and rank."""
        return f"{' x '.join(map(str, self.shape))}, rank {self.A.shape[-2]}"
