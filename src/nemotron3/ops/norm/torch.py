"""The norms through `torch.nn.functional.rms_norm`, which keeps fewer intermediates."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)


def gated_group_norm_torch(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """RMS norm of x SiLU(gate) within each of `groups` equal parts of the last axis."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = (x.to(dtype) * F.silu(gate.to(dtype))).unflatten(-1, (groups, -1))
    normed = F.rms_norm(parts, (parts.shape[-1],), None, eps).flatten(-2)
    return (normed * weight.to(dtype)).to(x.dtype)
