"""The mixture-of-experts layer, standard or latent.

White paper, section 2.2. With x the normed input of width d and l the latent width:

    s   = sigmoid(W_r x)                    scores, in float32, from the full width
    T   = the k experts with the largest s + b     the bias b balances load and only selects
    g_i = scale * s_i / sum over T of s
    y   = W_up sum over T of g_i E_i(W_down x) + shared(x)

The latent projections stand around the whole mixture: one down-projection before the tokens go to
their experts and one up-projection after their results are summed, so that what travels and what
the experts read is l wide. Without a latent width they are absent and the experts work at width d.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron3.models.config import MoEConfig
from nemotron3.models.initial_values import Constant, Normal
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.mlp import MLP
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.experts.activations import up_factor
from nemotron3.ops.linear import linear
from nemotron3.ops.routing import route


class Routing(NamedTuple):
    """What a router decided: enough to balance it, to measure it, and to replay it."""

    indices: Int[Tensor, "tokens choice"]
    """Chosen experts."""
    weights: Float[Tensor, "tokens choice"]
    """Their weights in the sum."""
    scores: Float[Tensor, "tokens expert"]
    """Scores of all experts, without the selection bias."""


class Router(DeclaredModule):
    """Chooses experts for each token, in float32 whatever the model runs in."""

    weight: nn.Parameter
    e_score_correction_bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.declare("weight", (experts, hidden_size), init=Normal(), decays=True)
        # Its rounding would change which experts are chosen, and steps of 1e-3 would be lost in it.
        self.declare_buffer(
            "e_score_correction_bias", (experts,), init=Constant(0.0), keep_float32=True
        )

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        indices: Int[Tensor, "tokens choice"] | None = None,
    ) -> Routing:
        """Score all experts, choose the best or take those of `indices`, weigh them."""
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x.to(wide), self.weight.to(wide))
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

    up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.moe_intermediate_size
        rows, experts = hidden * up_factor(config.activation), config.n_routed_experts
        self.declare("up_proj", (experts, rows, width), init=Normal(), decays=True)
        # Megatron scales both second matrices of a latent mixture: this one and fc2_latent_proj.
        second = Normal(writes_residual=True)
        self.declare("down_proj", (experts, width, hidden), init=second, decays=True)

    def forward(self, x: Float[Tensor, "tokens width"], routing: Routing) -> Tensor:
        """Weighted sum of each token's experts."""
        return routed_experts(
            x,
            routing.indices,
            routing.weights,
            self.up_proj.to(x.dtype),
            self.down_proj.to(x.dtype),
            activation=self.config.activation,
        )


class MixtureOfExperts(nn.Module):
    """Router, routed experts, and the shared expert that every token passes."""

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

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout | None = None,  # noqa: ARG002 - a mixer like any other
        state: None = None,  # noqa: ARG002
        indices: Int[Tensor, "tokens choice"] | None = None,
    ) -> tuple[Float[Tensor, "tokens d_model"], Routing]:
        """Send each token through its experts; also returns what the router decided.

        With `indices` the experts are those, for example of the pass that sampled the tokens, and
        their weights follow from this pass's scores.
        """
        routing = self.gate(x, indices)
        payload = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        y = self.experts(payload, routing)
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing
