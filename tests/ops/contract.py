"""The contract that every backend of every operation is held to: outputs and gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def outputs_and_gradients(
    call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of `call(*inputs)`, then the gradient of a fixed random functional for each input."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = [t for t in call(*leaves) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    functional = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum()
        for y in outputs
        if y.requires_grad
    )
    wanted = [t for t in leaves if t.requires_grad]
    gradients = torch.autograd.grad(functional, wanted, allow_unused=True)
    zeros = (torch.zeros_like(t) for t in wanted)
    return [*(y.detach() for y in outputs)] + [
        z if g is None else g for g, z in zip(gradients, zeros, strict=True)
    ]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)
