"""A mixer, the part of a layer between norm and residual sum, and what it declares about itself.

A mixer is a pair: a configuration, which declares its state and costs, and the module that it
builds. Both are in the mixer's own file. Cache, costs, memory and the model itself read only the
declarations of this interface, so a new mixer is its file and a field of `ModelConfig` (or, outside
this package, of a subclass of it): see docs/guides/add-a-mixer.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.models.cache.state import LayerState, StateMemory, StateSize
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.parameter import DeclaredModule


class ParameterCount(NamedTuple):
    """Parameters of a part of a model."""

    total: int
    active: int
    """Those that one token passes."""

    @classmethod
    def of(cls, module: nn.Module) -> "ParameterCount":
        """Of a module that every token passes as a whole."""
        total = sum(parameter.numel() for parameter in module.parameters())
        return cls(total, total)


class Mixer(DeclaredModule):
    """The module of one layer.

    `forward(x, layout, state=None)` takes the normed residual stream [tokens, d_model] and returns
    what is added to it, of the same shape. Whatever looks along time takes `layout.segments` and
    never mixes two of them; with a state it continues what the layout's slots hold. A mixer with a
    router returns a pair of that and the router's decision.
    """

    def update_state(
        self, x: Float[Tensor, "tokens d_model"], layout: SequenceLayout, state: LayerState
    ) -> None:
        """Let the state take in tokens whose outputs nobody asks for."""
        self(x, layout, state)

    def parameter_counts(self) -> dict[str, ParameterCount]:
        """Its parameters by part, under the names that tables of costs have."""
        raise NotImplementedError(f"{type(self).__name__} has no parameter_counts")


@dataclass(frozen=True, kw_only=True)
class MixerConfig(ABC):
    """The configuration of one kind of layer."""

    symbol: ClassVar[str]
    """The layer's character in a pattern."""
    label: ClassVar[str]
    """The layer's name in messages and tables."""
    has_router: ClassVar[bool] = False
    """Whether the mixer chooses experts, and returns the decision beside its output."""

    @abstractmethod
    def build(self, hidden_size: int, eps: float) -> Mixer:
        """The module, for a residual stream of this width; `eps` is the norms'."""

    @property
    def state_size(self) -> StateSize:
        """What a layer carries between calls: nothing, where a token is mixed with no other."""
        return StateSize()

    def new_state(self, memory: StateMemory) -> LayerState | None:  # noqa: ARG002
        """An empty state, if a layer carries one."""
        return None

    def mixing_flops(self, context: int) -> float:  # noqa: ARG002
        """FLOPs of a token beside the products with parameters, in a sequence of `context`."""
        return 0.0

    @property
    def is_stateful(self) -> bool:
        """Whether a token's output depends on the tokens before it."""
        return any(self.state_size)


def last_stateful_layer(mixers: Sequence[MixerConfig]) -> int:
    """The last layer whose state a token enters; the first if there is none.

    Behind it a token can be left out, and no other notices.
    """
    return max((i for i, mixer in enumerate(mixers) if mixer.is_stateful), default=0)
