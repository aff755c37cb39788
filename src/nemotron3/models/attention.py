"""Grouped-query attention, without positions; rotary ones are for the comparison models.

The published configurations carry `rope_theta`, but the models were trained without rotary
positions; reading that field as a wish for them ruins the model (white paper, section 2.5).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.models.config import AttentionConfig
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.norm import RMSNorm
from nemotron3.models.state import AttentionState
from nemotron3.ops.attention import attention
from nemotron3.ops.rotary import rotate


class Attention(nn.Module):
    """Looks back at every earlier token of the same sequence."""

    def __init__(self, config: AttentionConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden_size, queries)
        self.k_proj = Linear(hidden_size, keys)
        self.v_proj = Linear(hidden_size, keys)
        self.o_proj = Linear(queries, hidden_size, writes_residual=True)
        self.q_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        state: AttentionState | None = None,
    ) -> Float[Tensor, "tokens d_model"]:
        """Attend within each sequence, and to what `state` remembers of it."""
        c = self.config
        q = self.q_norm(self.q_proj(x).unflatten(-1, (c.num_attention_heads, c.head_dim)))
        q = self._rotated(q, layout)
        k, v = self._keys_and_values(x, layout)
        if state is not None and layout.is_step and not torch.is_grad_enabled():
            y = state.attend(layout, q, k, v)
        else:
            if state is not None:
                k, v = state.extend(layout, k, v)
            y = attention(q, k, v, queries=layout.segments, keys=layout.keys)
        return self.o_proj(y.flatten(-2))

    def remember(
        self, x: Float[Tensor, "tokens d_model"], layout: SequenceLayout, state: AttentionState
    ) -> None:
        """Keep the keys and values of tokens whose outputs nobody asks for."""
        state.remember(layout, *self._keys_and_values(x, layout))

    def _keys_and_values(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        c = self.config
        k = self.k_norm(self.k_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim)))
        v = self.v_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim))
        return self._rotated(k, layout), v

    def _rotated(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        theta = self.config.rope_theta
        return x if theta is None else rotate(x, layout.positions(x.device), theta)
