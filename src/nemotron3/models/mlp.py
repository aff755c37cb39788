"""The dense feed-forward layer, which is also the shared expert of an MoE layer."""

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.checks import require_choice, require_positive
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.mixer import KeptActivations, Mixer, MixerConfig, ParameterCount
from nemotron3.ops.experts import Activation, activate


@dataclass(frozen=True, kw_only=True)
class MLPConfig(MixerConfig):
    """A dense feed-forward layer."""

    symbol: ClassVar[str] = "-"
    label: ClassVar[str] = "mlp"

    intermediate_size: int
    """Hidden units."""
    activation: Activation = "relu2"
    """Squared ReLU, or SwiGLU with a gate matrix of its own."""

    def __post_init__(self) -> None:
        require_positive(self, "intermediate_size")
        require_choice(self, "activation", get_args(Activation))

    def build(self, hidden_size: int, eps: float) -> "MLP":  # noqa: ARG002 - no norm
        """The module."""
        return MLP(hidden_size, self.intermediate_size, self.activation)

    def kept_activations(self, hidden_size: int, dtype: torch.dtype) -> KeptActivations:
        """The normed input and the hidden units."""
        units = kept_hidden_units(self.intermediate_size, self.activation)
        return KeptActivations((hidden_size + units) * dtype.itemsize)


def kept_hidden_units(width: int, activation: Activation) -> int:
    """Elements per token that a dense layer keeps between its products.

    Squared ReLU keeps the root and the square; SwiGLU both halves, the gate after SiLU, and their
    product.
    """
    return {"relu2": 2, "swiglu": 4}[activation] * width


class MLP(Mixer):
    """Two matrices around squared ReLU, or three with SwiGLU's gate."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        if activation == "swiglu":
            self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size, writes_residual=True)

    def parameter_counts(self) -> dict[str, ParameterCount]:
        """All parameters, as one part."""
        return {"dense feed-forward": ParameterCount.of(self)}

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout | None = None,  # noqa: ARG002 - a mixer like any other
        state: None = None,  # noqa: ARG002
    ) -> Float[Tensor, "tokens d_model"]:
        """The output of each token, computed independently."""
        h = self.up_proj(x)
        if self.activation == "swiglu":
            h = torch.cat([self.gate_proj(x), h], dim=-1)
        return self.down_proj(activate(h, self.activation))
