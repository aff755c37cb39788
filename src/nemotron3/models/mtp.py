"""Multi-token prediction (MTP): one small block, applied once for each further token.

Super report, section 2.1.2; wiring as in Megatron-LM's hybrid stack. Depth k predicts, at position
i, token i + k + 1 (the main head predicts i + 1):

    h_0 = the backbone's output after its final norm
    c   = W_eh [ norm_e(embedding of token i + k) ; norm_h(h_{k-1}) ]     embedding half first
    h_k = final_norm(block(c))                                           here `*E`, own attention
    logits = the backbone's own output layer (h_k)

All depths share the block's weights, so it can be applied at more depths than in training; the
embedding and the output layer are those of the backbone. In published checkpoints the input part
belongs to the first layer and the final norm to the last; `models/huggingface` translates.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nemotron3.models.block import Block
from nemotron3.models.cache.state import LayerState
from nemotron3.models.config import ModelConfig
from nemotron3.models.experts import Routing
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.mixer import last_stateful_layer
from nemotron3.models.norm import RMSNorm


class MTPInput(nn.Module):
    """Combines the embedding of the next token with the hidden state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.enorm = RMSNorm(width, eps)
        self.hnorm = RMSNorm(width, eps)
        self.eh_proj = Linear(2 * width, width)

    def forward(
        self, embedding: Float[Tensor, "tokens d_model"], hidden: Float[Tensor, "tokens d_model"]
    ) -> Float[Tensor, "tokens d_model"]:
        """Norm both halves and project them to the model's width."""
        return self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))


class MultiTokenPredictor(nn.Module):
    """The shared block of all depths."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input = MTPInput(config)
        self.layers = nn.ModuleList(Block(kind, config) for kind in config.mtp_layers)
        self.last_stateful_layer = last_stateful_layer(config.mtp_layers)
        self.final_layernorm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self,
        embedding: Float[Tensor, "tokens d_model"],
        hidden: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        states: Sequence[LayerState | None] | None = None,
        output_indices: Int[Tensor, " outputs"] | None = None,
        routes: Sequence[Int[Tensor, "tokens choice"]] | None = None,
    ) -> tuple[Float[Tensor, "tokens d_model"], list[Routing]]:
        """One depth: computes h_k from h_{k-1} and the embeddings of tokens i + k.

        With the `states` of its layers the block continues the sequences in the layout's slots.
        With `output_indices` the layers after the last one with a state compute only these tokens.
        `routes` are the experts of all tokens of the call, for each MoE layer of the block.
        """
        x = self.input(embedding, hidden)
        recorded = iter(routes or ())
        rows: Tensor | None = None  # `output_indices`, in the layers that compute only these
        routings = []
        states = states or [None] * len(self.layers)
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            chosen = next(recorded, None) if layer.has_router else None
            if chosen is not None and rows is not None:
                chosen = chosen[rows]
            x, routing = layer(x, layout, state, chosen)
            if routing is not None:
                routings.append(routing)
            if output_indices is not None and index == self.last_stateful_layer:
                x, rows = F.embedding(output_indices, x), output_indices
        return self.final_layernorm(x), routings

    def unroll(
        self,
        embeddings: Sequence[Float[Tensor, "tokens d_model"]],
        hidden: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        *,
        routes: Sequence[Sequence[Tensor]] | None = None,
        recompute: bool = False,
    ) -> tuple[list[Float[Tensor, "tokens d_model"]], list[list[Routing]]]:
        """All depths, one after another: `embeddings[k - 1]` are those of tokens i + k.

        `routes` are the experts by depth and MoE layer; with `recompute` only the inputs of each
        depth are stored for the backward pass.
        """
        outputs: list[Tensor] = []
        routings: list[list[Routing]] = []
        for depth, embedding in enumerate(embeddings):
            given = None if routes is None else routes[depth]
            inputs = (embedding, hidden, layout, None, None, given)
            if recompute:
                hidden, routed = checkpoint(
                    self, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, routed = self(*inputs)
            outputs.append(hidden)
            routings.append(routed)
        return outputs, routings

    def read(
        self,
        embedding: Float[Tensor, "tokens d_model"],
        hidden: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        states: Sequence[LayerState | None],
    ) -> None:
        """Advance the states of the block's layers by tokens whose outputs are not needed."""
        last = self.last_stateful_layer
        state = states[last]
        if state is None:
            return
        x = self.input(embedding, hidden)
        for layer, layer_state in zip(self.layers[:last], states, strict=False):
            x, _ = layer(x, layout, layer_state)
        block = self.layers[last]
        assert isinstance(block, Block)
        block.update_state(x, layout, state)
