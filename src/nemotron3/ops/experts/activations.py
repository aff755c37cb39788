"""The two activations of expert and dense feed-forward layers, with their derivatives.

Nemotron uses squared ReLU (So et al., arXiv 2109.08668) between two matrices. The transformer that
it is compared with uses SwiGLU (Shazeer, arXiv 2002.05202), whose first matrix has twice as many
rows: the first half gives the gate and the second half the value.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu2", "swiglu"]
_UP_FACTORS = {"relu2": 1, "swiglu": 2}


def up_factor(activation: Activation) -> int:
    """Rows of the first matrix per hidden unit."""
    factor = _UP_FACTORS.get(activation)
    if factor is None:
        raise ValueError(f"activation is {activation!r}; choose from {', '.join(_UP_FACTORS)}")
    return factor


def activate(h: Tensor, activation: Activation) -> Tensor:
    """The hidden units [..., width] from the first product [..., width * up_factor]."""
    if activation == "relu2":
        return F.relu(h).square()
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


def activation_backward(h: Tensor, grad: Tensor, activation: Activation) -> Tensor:
    """Gradient of the first product, given the gradient of the hidden units."""
    if activation == "relu2":
        return F.relu(h).mul_(2).mul_(grad)
    gate, value = h.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = grad * value * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([d_gate, grad * silu], dim=-1)
