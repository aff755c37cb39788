"""One layer: norm, mixer, residual sum."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron3.models.attention import Attention
from nemotron3.models.config import ModelConfig
from nemotron3.models.experts import MixtureOfExperts, Routing
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.mamba2 import Mamba2Mixer
from nemotron3.models.mlp import MLP
from nemotron3.models.norm import RMSNorm
from nemotron3.models.pattern import LayerKind
from nemotron3.models.state import AttentionState, LayerState

Mixer = Mamba2Mixer | Attention | MixtureOfExperts | MLP


def build_mixer(kind: LayerKind, config: ModelConfig) -> Mixer:
    """The mixer of a layer; the config has been checked to describe it."""
    width, eps = config.hidden_size, config.layer_norm_epsilon
    match kind:
        case LayerKind.MAMBA:
            assert config.mamba is not None
            return Mamba2Mixer(config.mamba, width, eps)
        case LayerKind.ATTENTION:
            assert config.attention is not None
            return Attention(config.attention, width, eps)
        case LayerKind.EXPERTS:
            assert config.moe is not None
            return MixtureOfExperts(config.moe, width)
        case LayerKind.MLP:
            assert config.mlp is not None
            return MLP(width, config.mlp.intermediate_size, config.mlp.activation)


class Block(nn.Module):
    """x + mixer(norm(x)), with exactly one mixer."""

    def __init__(self, kind: LayerKind, config: ModelConfig) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = build_mixer(kind, config)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        state: LayerState | None = None,
        experts: Int[Tensor, "tokens choice"] | None = None,
    ) -> tuple[Float[Tensor, "tokens d_model"], Routing | None]:
        """The residual stream after this layer, and the router's decision where it has one.

        With `experts` the decision is theirs; a layer without a router is given none.
        """
        if self.has_router:
            y, routing = self.mixer(self.norm(x), layout, state, experts)
            return x + y, routing
        assert experts is None
        return x + self.mixer(self.norm(x), layout, state), None

    @property
    def has_router(self) -> bool:
        """Whether the mixer chooses experts."""
        return self.kind is LayerKind.EXPERTS

    def remember(
        self, x: Float[Tensor, "tokens d_model"], layout: SequenceLayout, state: AttentionState
    ) -> None:
        """Let an attention layer keep what it remembers of `x`, and nothing else."""
        assert isinstance(self.mixer, Attention)
        self.mixer.remember(self.norm(x), layout, state)
