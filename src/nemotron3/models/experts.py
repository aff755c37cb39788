"""The mixture-of-experts layer, standard or latent.

White paper, section 2.2. With x the normed input of width d and l the latent width:

    s   = sigmoid(W_r x)                    scores, in float32, from the full width
    T   = the k experts with the largest s + b     the bias b only affects this choice
    g_i = scale * s_i / sum over T of s
    y   = W_up sum over T of g_i E_i(W_down x) + shared(x)

The latent projections enclose the whole mixture: one down-projection before tokens are dispatched
to experts and one up-projection after the experts' results are summed, so that dispatched tokens
and expert matrices have width l. Without a latent width there are no projections, and the experts
have width d.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron3.errors import ConfigError
from nemotron3.models.checks import require_choice, require_positive
from nemotron3.models.initial_values import Constant, Normal
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.mixer import KeptActivations, Mixer, MixerConfig, ParameterCount
from nemotron3.models.mlp import MLP, kept_hidden_units
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.experts import Activation
from nemotron3.ops.experts.activations import up_factor
from nemotron3.ops.low_precision import ExpertsQuantization
from nemotron3.ops.products import dense, grouped
from nemotron3.ops.routing import route
from nemotron3.ops.weights import ComputedWeight, QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class MoEConfig(MixerConfig):
    """A mixture of experts; with `moe_latent_size` it is LatentMoE (white paper, section 2.2)."""

    symbol: ClassVar[str] = "E"
    label: ClassVar[str] = "experts"
    has_router: ClassVar[bool] = True

    n_routed_experts: int
    """Experts to choose from."""
    num_experts_per_tok: int
    """Experts chosen for each token."""
    moe_intermediate_size: int
    """Hidden units of a routed expert."""
    moe_shared_expert_intermediate_size: int = 0
    """Hidden units of the shared expert, which processes every token; 0 for none."""
    moe_latent_size: int | None = None
    """Width of the routed experts' inputs and outputs; None for the model's width."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' scores are divided by their sum."""
    activation: Activation = "relu2"
    """Activation of routed and shared experts."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become scores."""

    def __post_init__(self) -> None:
        require_positive(self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok} and n_routed_experts "
                f"{self.n_routed_experts}; a token cannot choose more experts than there are"
            )
        if self.moe_shared_expert_intermediate_size < 0:
            raise ConfigError(
                "moe_shared_expert_intermediate_size is negative; 0 means no shared expert"
            )
        if self.moe_latent_size is not None:
            require_positive(self, "moe_latent_size")
        require_choice(self, "activation", get_args(Activation))
        require_choice(self, "scoring", ("sigmoid", "softmax"))

    def build(self, hidden_size: int, eps: float) -> "MixtureOfExperts":  # noqa: ARG002 - no norm
        """The module."""
        return MixtureOfExperts(self, hidden_size)

    def kept_activations(self, hidden_size: int, dtype: torch.dtype) -> KeptActivations:
        """Of router, experts, shared expert and latent projections."""
        choices, shared = self.num_experts_per_tok, self.moe_shared_expert_intermediate_size
        narrow = hidden_size + choices
        narrow += choices * self.moe_intermediate_size * up_factor(self.activation)
        narrow += 2 * (self.moe_latent_size or 0)
        narrow += kept_hidden_units(shared, self.activation) if shared else 0
        wide = self.n_routed_experts + 4 * choices  # scores, and steps to the weights
        if dtype.itemsize < 4:
            wide += hidden_size  # the router's input
        indices = 8 * 4 * choices  # chosen experts, and the order of rows by expert
        return KeptActivations(narrow * dtype.itemsize + 4 * wide + indices)


class Routing(NamedTuple):
    """The decision of a router, as needed by load balancing, metrics and replay."""

    indices: Int[Tensor, "tokens choice"]
    """Chosen experts."""
    weights: Float[Tensor, "tokens choice"]
    """Weights of the chosen experts in the sum."""
    scores: Float[Tensor, "tokens expert"]
    """Scores of all experts, without the selection bias."""


class Router(DeclaredModule):
    """Chooses experts for each token, in float32 for any dtype of the model."""

    weight: nn.Parameter
    e_score_correction_bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        # In a narrower dtype, rounding would change the choice, and lose updates of 1e-3 of the
        # bias. Published quantized checkpoints hold the matrix in float32 beside bfloat16 ones.
        self.declare(
            "weight", (experts, hidden_size), init=Normal(), decays=True, keep_float32=True
        )
        self.declare_buffer(
            "e_score_correction_bias", (experts,), init=Constant(0.0), keep_float32=True
        )

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        indices: Int[Tensor, "tokens choice"] | None = None,
    ) -> Routing:
        """Score all experts, choose the best (or those of `indices`), and compute their weights."""
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = dense(x.to(wide), self.weight)
        return Routing(
            *route(
                logits,
                self.e_score_correction_bias,
                choices=c.num_experts_per_tok,
                scoring=c.scoring,
                normalise=c.norm_topk_prob,
                scale=c.routed_scaling_factor,
                indices=indices,
            )
        )


class RoutedExperts(DeclaredModule):
    """The experts' matrices, stacked."""

    up_proj: nn.Parameter | QuantizedWeight | ComputedWeight
    down_proj: nn.Parameter | QuantizedWeight | ComputedWeight

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.quantization: ExpertsQuantization | None = None
        """Formats of the operands in training; None for the dtype of activations."""
        hidden = config.moe_intermediate_size
        rows, experts = hidden * up_factor(config.activation), config.n_routed_experts
        shape = (experts, rows, width)
        self.declare("up_proj", shape, init=Normal(), decays=True, quantizes=True)
        # Megatron scales both second matrices of a latent MoE layer: this one and fc2_latent_proj.
        second = Normal(writes_residual=True)
        shape = (experts, width, hidden)
        self.declare("down_proj", shape, init=second, decays=True, quantizes=True)

    def forward(self, x: Float[Tensor, "tokens width"], routing: Routing) -> Tensor:
        """Weighted sum of each token's experts."""
        return grouped(
            x,
            routing.indices,
            routing.weights,
            self.up_proj,
            self.down_proj,
            activation=self.config.activation,
            quantization=self.quantization,
        )


class MixtureOfExperts(Mixer):
    """Router, routed experts, and the shared expert, which processes every token."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.moe_latent_size or hidden_size
        self.gate = Router(config, hidden_size)
        self.experts = RoutedExperts(config, width)
        self.shared_experts = (
            MLP(hidden_size, config.moe_shared_expert_intermediate_size, config.activation)
            if config.moe_shared_expert_intermediate_size
            else None
        )
        latent = config.moe_latent_size is not None
        self.fc1_latent_proj = Linear(hidden_size, width) if latent else None
        self.fc2_latent_proj = Linear(width, hidden_size, writes_residual=True) if latent else None

    def parameter_counts(self) -> dict[str, ParameterCount]:
        """Router, routed experts (of which a token uses some), shared expert and projections."""
        c = self.gate.config
        experts = ParameterCount.of(self.experts).total
        parts = {
            "router": ParameterCount.of(self.gate),
            "routed experts": ParameterCount(
                experts, experts * c.num_experts_per_tok // c.n_routed_experts
            ),
        }
        if self.shared_experts is not None:
            parts["shared experts"] = ParameterCount.of(self.shared_experts)
        if self.fc1_latent_proj is not None and self.fc2_latent_proj is not None:
            both = nn.ModuleList([self.fc1_latent_proj, self.fc2_latent_proj])
            parts["latent projections"] = ParameterCount.of(both)
        return parts

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout | None = None,  # noqa: ARG002 - a mixer like any other
        state: None = None,  # noqa: ARG002
        indices: Int[Tensor, "tokens choice"] | None = None,
    ) -> tuple[Float[Tensor, "tokens d_model"], Routing]:
        """The weighted sum of each token's experts, and the router's decision.

        With `indices` the experts are given, for example those of the pass that sampled the tokens;
        their weights are computed from the scores of this pass.
        """
        routing = self.gate(x, indices)
        payload = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        y = self.experts(payload, routing)
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing
