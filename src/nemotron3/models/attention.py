"""Grouped-query attention, without position embedding in Nemotron 3, with RoPE in Qwen3.

The published configurations of Nemotron 3 have a `rope_theta`, but the models were trained without
rotary positions; applying them because of that field ruins the model (white paper, section 2.5).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron3.errors import ConfigError
from nemotron3.models.cache.attention_state import AttentionState
from nemotron3.models.cache.state import StateMemory, StateSize
from nemotron3.models.checks import require_divides, require_positive
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.mixer import KeptActivations, Mixer, MixerConfig, ParameterCount
from nemotron3.models.norm import RMSNorm
from nemotron3.ops.attention import attention
from nemotron3.ops.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Grouped-query attention; in Nemotron 3 only the Mamba layers depend on positions."""

    symbol: ClassVar[str] = "*"
    label: ClassVar[str] = "attention"
    continues_prefixes: ClassVar[bool] = True

    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads, each shared by a group of query heads."""
    head_dim: int
    """Channels per head."""
    rope_theta: float | None = None
    """Base of the rotary position embedding; None for no position embedding, as in Nemotron 3."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normed per head, as in Qwen3."""

    def __post_init__(self) -> None:
        require_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        require_divides(self, "num_attention_heads", "num_key_value_heads")
        if self.rope_theta is not None:
            require_positive(self, "rope_theta")
            if self.head_dim % 2:
                raise ConfigError(
                    f"head_dim is {self.head_dim}; rotary positions turn channels in pairs, so it "
                    "must be even"
                )

    @property
    def state_size(self) -> StateSize:
        """Keys and values of each token."""
        return StateSize(per_token=2 * self.num_key_value_heads * self.head_dim)

    def build(self, hidden_size: int, eps: float) -> "Attention":
        """The module."""
        return Attention(self, hidden_size, eps)

    def new_state(self, memory: StateMemory) -> AttentionState:
        """A state without tokens."""
        return AttentionState(
            memory, num_key_value_heads=self.num_key_value_heads, head_dim=self.head_dim
        )

    def mixing_flops(self, context: int) -> float:
        """FLOPs per token of scores and sums; on average a token attends to half of `context`."""
        return 2 * 2 * self.num_attention_heads * self.head_dim * (context + 1) / 2

    def kept_activations(self, hidden_size: int, dtype: torch.dtype) -> KeptActivations:
        """Operands and result of attention, a number for each row of scores; inputs of norms."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        narrow, wide = hidden_size + 2 * queries + 2 * keys, self.num_attention_heads
        if self.qk_norm:
            narrow += queries + keys
            wide += self.num_attention_heads + self.num_key_value_heads
        if self.rope_theta is not None:
            wide += 2 * self.head_dim  # the angles' cosines and sines, for queries and for keys
        return KeptActivations(narrow * dtype.itemsize + 4 * wide)


class Attention(Mixer):
    """Causal grouped-query attention within each sequence."""

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

    def parameter_counts(self) -> dict[str, ParameterCount]:
        """All parameters, as one part."""
        return {"attention": ParameterCount.of(self)}

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        layout: SequenceLayout,
        state: AttentionState | None = None,
    ) -> Float[Tensor, "tokens d_model"]:
        """Attend within each sequence; with a `state`, also to the keys and values stored there."""
        c = self.config
        q = self.q_norm(self.q_proj(x).unflatten(-1, (c.num_attention_heads, c.head_dim)))
        q = self._rotated(q, layout)
        k, v = self.keys_and_values(x, layout)
        if state is not None and layout.is_step and not torch.is_grad_enabled():
            y = state.attend(layout, q, k, v)
        else:
            if state is not None:
                k, v = state.extend(layout, k, v)
            elif layout.prefixes:
                index = layout.key_index(k.device)
                k, v = k.index_select(0, index), v.index_select(0, index)
            y = attention(q, k, v, queries=layout.segments, keys=layout.keys)
        return self.o_proj(y.flatten(-2))

    def update_state(
        self, x: Float[Tensor, "tokens d_model"], layout: SequenceLayout, state: AttentionState
    ) -> None:
        """Store the keys and values of tokens whose outputs are not needed."""
        state.write(layout, *self.keys_and_values(x, layout))

    def keys_and_values(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Those of each token, [tokens, head, head_dim], as they are stored."""
        c = self.config
        k = self.k_norm(self.k_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim)))
        v = self.v_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim))
        return self._rotated(k, layout), v

    def _rotated(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        theta = self.config.rope_theta
        return x if theta is None else rotate(x, layout.positions(x.device), theta)
