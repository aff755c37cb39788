"""One layer: norm, mixer, residual sum."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron3.models.cache.state import LayerState
from nemotron3.models.config import ModelConfig
from nemotron3.models.experts import Routing
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.mixer import MixerConfig
from nemotron3.models.norm import RMSNorm


class Block(nn.Module):
    """x + mixer(norm(x)), with exactly one mixer."""

    def __init__(self, kind: MixerConfig, config: ModelConfig) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = kind.build(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        state: LayerState | None = None,
        experts: Int[Tensor, "tokens choice"] | None = None,
    ) -> tuple[Float[Tensor, "tokens d_model"], Routing | None]:
        """The residual stream after this layer, and the decision of its router, if it has one.

        `experts` are the experts to use instead of the router's choice; None for other layers.
        """
        if self.has_router:
            y, routing = self.mixer(self.norm(x), layout, state, experts)
            return x + y, routing
        assert experts is None
        return x + self.mixer(self.norm(x), layout, state), None

    @property
    def has_router(self) -> bool:
        """Whether the mixer chooses experts."""
        return self.kind.has_router

    def update_state(
        self, x: Float[Tensor, "tokens d_model"], layout: SequenceLayout, state: LayerState
    ) -> None:
        """Advance the layer's state by tokens whose outputs are not needed."""
        self.mixer.update_state(self.norm(x), layout, state)
