"""The interface of mixers: the part of a layer between norm and residual sum.

A mixer is a pair: a configuration, which declares its state and costs, and the module that it
builds. Both are in the mixer's own file. The cache, the costs, the engine's memory and the model
read only this interface, so a new mixer is one file and one field of `ModelConfig` (or, outside
this package, of a subclass of it): see docs/guides/add-a-mixer.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.models.cache.state import LayerState, StateMemory, StateSize
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.parameter import DeclaredModule


class ParameterCount(NamedTuple):
    """Parameters of a part of a model."""

    total: int
    active: int
    """Parameters that are used for one token."""

    @classmethod
    def of(cls, module: nn.Module) -> "ParameterCount":
        """The count of a module whose parameters are all used for every token."""
        total = sum(parameter.numel() for parameter in module.parameters())
        return cls(total, total)


class KeptActivations(NamedTuple):
    """Bytes that a layer keeps of its forward pass for the backward pass, weights left out.

    Upper bounds over the backends that keep inputs alone and make the rest again (`native` for
    float32 on a CPU, `triton` on a GPU).
    """

    per_token: int
    per_sequence: int = 0


class Mixer(DeclaredModule):
    """The module of one layer.

    `forward(x, layout, state=None)` takes the normed residual stream [tokens, d_model] and returns
    the layer's contribution to it, of the same shape. A token may depend only on tokens of the same
    segment of `layout.segments`; with a `state`, the sequences continue those in the layout's
    slots. A mixer with a router returns a pair: the contribution and the router's decision.
    """

    def update_state(
        self, x: Float[Tensor, "tokens d_model"], layout: SequenceLayout, state: LayerState
    ) -> None:
        """Advance the state by tokens whose outputs are not needed."""
        self(x, layout, state)

    def parameter_counts(self) -> dict[str, ParameterCount]:
        """Its parameters by part; the names are those in tables of costs."""
        raise NotImplementedError(f"{type(self).__name__} has no parameter_counts")


@dataclass(frozen=True, kw_only=True)
class MixerConfig(ABC):
    """The configuration of one kind of layer."""

    symbol: ClassVar[str]
    """The layer's character in a pattern."""
    label: ClassVar[str]
    """The layer's name in messages and tables."""
    continues_prefixes: ClassVar[bool] = False
    """Whether the mixer heeds `SequenceLayout.prefixes`. One without state need not: what it makes
    of a token depends on no other."""
    has_router: ClassVar[bool] = False
    """Whether the mixer chooses experts, and returns the decision with its output."""

    @abstractmethod
    def build(self, hidden_size: int, eps: float) -> Mixer:
        """The module, for a residual stream of this width; `eps` is that of norms."""

    @property
    def state_size(self) -> StateSize:
        """The size of a layer's state between calls; 0 for a mixer without state."""
        return StateSize()

    def new_state(self, memory: StateMemory) -> LayerState | None:  # noqa: ARG002
        """An empty state; None for a mixer without state."""
        return None

    def mixing_flops(self, context: int) -> float:  # noqa: ARG002
        """FLOPs per token in addition to products with parameters, at a length of `context`."""
        return 0.0

    def kept_activations(self, hidden_size: int, dtype: torch.dtype) -> KeptActivations:
        """What is kept in training beside the layer's input, in activations of `dtype`.

        By default that is the normed input, which the first product keeps.
        """
        return KeptActivations(hidden_size * dtype.itemsize)

    @property
    def is_stateful(self) -> bool:
        """Whether a token's output depends on the tokens before it."""
        return any(self.state_size)


def last_stateful_layer(mixers: Sequence[MixerConfig]) -> int:
    """Index of the last layer with a state; 0 if there is none.

    After this layer no token affects another, so tokens whose outputs are not needed are skipped.
    """
    return max((i for i, mixer in enumerate(mixers) if mixer.is_stateful), default=0)
