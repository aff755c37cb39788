"""Norm layers: a weight around the operations of `nemotron3.ops.norm`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.ops.norm import gated_group_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Norm over the last axis."""
        return rms_norm(x, self.weight, self.eps)


class GatedGroupNorm(nn.Module):
    """The norm between Mamba-2's scan and its output projection."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.groups = groups
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "tokens d"], gate: Float[Tensor, "tokens d"]
    ) -> Float[Tensor, "tokens d"]:
        """Norm of `x * SiLU(gate)` within each group of channels."""
        return gated_group_norm(x, gate, self.weight, groups=self.groups, eps=self.eps)
