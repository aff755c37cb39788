"""The scan's step sizes and decay rates, from the learned parameters."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import ParallelKernel

_rates = ParallelKernel(Path(__file__).with_name("rates.cpp"), "ssd_rates", "ppppp iii")


def ssd_rates_torch(dt: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.ssd.api.ssd_rates`."""
    return F.softplus(dt + dt_bias), -torch.exp(A_log)


def ssd_rates_native(dt: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one C++ call; with gradients, PyTorch's operations."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (dt, dt_bias, A_log)):
        return ssd_rates_torch(dt, dt_bias, A_log)
    dt = contiguous_rows(dt)
    steps, decay = dt.new_empty(dt.shape), A_log.new_empty(A_log.shape)
    operands = (dt, dt_bias.contiguous(), A_log.contiguous())
    _rates(*operands, steps, decay, *dt.shape, dt.stride(0), work=16 * dt.numel())
    return steps, decay
