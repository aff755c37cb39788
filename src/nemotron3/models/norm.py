"""Norm layers: modules with the weights of the operations in `nemotron3.ops.norm`."""

from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.models.initial_values import Constant
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.norm import gated_group_norm, rms_norm


class RMSNorm(DeclaredModule):
    """Root-mean-square norm with a weight."""

    weight: nn.Parameter

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.declare("weight", (size,), init=Constant(1.0), decays=False)
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Norm over the last axis."""
        return rms_norm(x, self.weight, self.eps)


class GatedGroupNorm(DeclaredModule):
    """The norm between Mamba-2's scan and its output projection."""

    weight: nn.Parameter

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.declare("weight", (size,), init=Constant(1.0), decays=False)
        self.groups = groups
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "tokens d"], gate: Float[Tensor, "tokens d"]
    ) -> Float[Tensor, "tokens d"]:
        """Norm of `x * SiLU(gate)` within each group of channels."""
        return gated_group_norm(x, gate, self.weight, groups=self.groups, eps=self.eps)
