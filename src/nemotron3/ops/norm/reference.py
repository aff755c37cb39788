"""The two norms of the family, written out.

RMS norm (Zhang & Sennrich, arXiv 1910.07467): y = w x / sqrt(mean(x^2) + eps), computed in float32
and multiplied by the weight before it is cast back, as in the training of the published
checkpoints. The gated norm multiplies by SiLU(gate) first (`norm_before_gate=False`) and takes the
mean within groups of channels, so that a group's norm never depends on another tensor-parallel
rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis."""
    wide = _at_least_float32(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)


def gated_group_norm_reference(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """RMS norm of x SiLU(gate) within each of `groups` equal parts of the last axis."""
    wide = _at_least_float32(x) * F.silu(_at_least_float32(gate))
    parts = wide.unflatten(-1, (groups, -1))
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return (weight * (parts * scale).flatten(-2)).to(x.dtype)
