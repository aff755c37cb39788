"""The dense feed-forward layer, also the shared expert of a mixture."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.ops.experts import Activation, activate


class MLP(nn.Module):
    """Two matrices around squared ReLU, or three with SwiGLU's gate."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        if activation == "swiglu":
            self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size, writes_residual=True)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout | None = None,  # noqa: ARG002 - a mixer like any other
        state: None = None,  # noqa: ARG002
    ) -> Float[Tensor, "tokens d_model"]:
        """Feed each token forward by itself."""
        h = self.up_proj(x)
        if self.activation == "swiglu":
            h = torch.cat([self.gate_proj(x), h], dim=-1)
        return self.down_proj(activate(h, self.activation))
