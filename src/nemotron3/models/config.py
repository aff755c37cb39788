"""What a model is: one record per kind of layer, and the pattern that strings them together.

Fields are called as in the published `config.json`; other spellings live in `huggingface.py` alone.
A record is complete when it exists: everything that can be wrong with it is checked on
construction.

    config = ModelConfig.preset("nano")
    wider = dataclasses.replace(config, hidden_size=4096)
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from nemotron3.errors import ConfigError
from nemotron3.models.pattern import LayerKind, LayerPattern, parse_pattern
from nemotron3.models.presets import PRESETS
from nemotron3.ops.experts import Activation


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ConfigError(f"{type(owner).__name__}.{name} is {value}; it must be positive")


def _require_divides(owner: Any, whole: str, part: str) -> None:
    if getattr(owner, whole) % getattr(owner, part):
        raise ConfigError(
            f"{whole} = {getattr(owner, whole)} is not divisible by {part} = "
            f"{getattr(owner, part)}; change one of the two"
        )


def _require_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise ConfigError(
            f"{type(owner).__name__}.{name} is {value!r}; choose from {', '.join(choices)}"
        )


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A Mamba-2 mixer (Nemotron 3 Nano report, table 1)."""

    mamba_num_heads: int
    """State-space heads."""
    mamba_head_dim: int
    """Channels per head; heads times channels is the inner width, whatever `hidden_size` is."""
    ssm_state_size: int
    """Size N of the state that each channel keeps."""
    n_groups: int
    """Groups of heads that share B and C, and groups of the gated norm."""
    conv_kernel: int = 4
    """Taps of the causal convolution."""
    chunk_size: int = 128
    """Tokens per chunk of the scan: speed only, never the result."""
    time_step_min: float = 0.001
    """Smallest step at initialisation."""
    time_step_max: float = 0.1
    """Largest step at initialisation."""
    time_step_floor: float = 1e-4
    """Steps below this are raised to it at initialisation."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "chunk_size"
        )
        _require_divides(self, "mamba_num_heads", "n_groups")
        if self.conv_kernel < 2:
            raise ConfigError(
                f"conv_kernel is {self.conv_kernel}; a convolution needs at least 2 taps"
            )
        _require_positive(self, "time_step_min", "time_step_floor")
        if self.time_step_min > self.time_step_max:
            raise ConfigError(
                f"time_step_min is {self.time_step_min} and time_step_max {self.time_step_max}; "
                "initial steps are drawn between the two, so the first must not be larger"
            )

    @property
    def inner_size(self) -> int:
        """Width of x and of the gate z."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C together."""
        return self.inner_size + 2 * self.n_groups * self.ssm_state_size


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention; the Nemotron 3 models leave positions to the Mamba layers."""

    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads, each shared by a group of query heads."""
    head_dim: int
    """Channels per head."""
    rope_theta: float | None = None
    """Base of rotary positions; None for no positions at all, as in Nemotron 3."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normed per head, as in Qwen3."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        _require_divides(self, "num_attention_heads", "num_key_value_heads")
        if self.rope_theta is not None:
            _require_positive(self, "rope_theta")
            if self.head_dim % 2:
                raise ConfigError(
                    f"head_dim is {self.head_dim}; rotary positions turn channels in pairs, so it "
                    "must be even"
                )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts; with `moe_latent_size` it is LatentMoE (white paper, section 2.2)."""

    n_routed_experts: int
    """Experts to choose from."""
    num_experts_per_tok: int
    """Experts chosen for each token."""
    moe_intermediate_size: int
    """Hidden units of a routed expert."""
    moe_shared_expert_intermediate_size: int = 0
    """Hidden units of the expert that every token passes; 0 for none."""
    moe_latent_size: int | None = None
    """Width in which the routed experts work; None for the model's full width."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' scores are divided by their sum."""
    activation: Activation = "relu2"
    """Activation of routed and shared experts."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become scores."""

    def __post_init__(self) -> None:
        _require_positive(self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
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
            _require_positive(self, "moe_latent_size")
        _require_choice(self, "activation", get_args(Activation))
        _require_choice(self, "scoring", ("sigmoid", "softmax"))


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A dense feed-forward layer."""

    intermediate_size: int
    """Hidden units."""
    activation: Activation = "relu2"
    """Squared ReLU, or SwiGLU with a gate matrix of its own."""

    def __post_init__(self) -> None:
        _require_positive(self, "intermediate_size")
        _require_choice(self, "activation", get_args(Activation))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole language model."""

    hybrid_override_pattern: str
    """Layers in Megatron's notation, such as `MEMEM*EME/*E/*E`; see `nemotron3.models.pattern`."""
    vocab_size: int
    """Entries of the embedding and of the output layer."""
    hidden_size: int
    """Width of the residual stream."""
    mamba: MambaConfig | None = None
    """The `M` layers."""
    attention: AttentionConfig | None = None
    """The `*` layers."""
    moe: MoEConfig | None = None
    """The `E` layers."""
    mlp: MLPConfig | None = None
    """The `-` layers."""
    layer_norm_epsilon: float = 1e-5
    """Added to the mean square in every norm."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding matrix."""
    initializer_range: float | None = None
    """Standard deviation of initial weights; None for the published sqrt(0.8 / hidden_size)."""
    max_position_embeddings: int = 262_144
    """Longest context the model is meant for; no tensor has this size."""
    bos_token_id: int = 1
    """Begin of sequence."""
    eos_token_id: int | tuple[int, ...] = 2
    """End of sequence, or every token that ends one."""
    pad_token_id: int = 0
    """Filler that is never predicted."""

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "hidden_size", "layer_norm_epsilon")
        if not self.eos_token_ids:
            raise ConfigError("ModelConfig.eos_token_id is empty; name at least one token")
        if self.initializer_range is not None:
            _require_positive(self, "initializer_range")
        parts = {
            LayerKind.MAMBA: self.mamba,
            LayerKind.ATTENTION: self.attention,
            LayerKind.EXPERTS: self.moe,
            LayerKind.MLP: self.mlp,
        }
        fields = dict(zip(parts, ("mamba", "attention", "moe", "mlp"), strict=True))
        for kind in self.pattern.kinds:
            if parts[kind] is None:
                raise ConfigError(
                    f"pattern {self.hybrid_override_pattern!r} has {kind.value!r} layers but "
                    f"ModelConfig.{fields[kind]} is None; describe them there"
                )
        for kind, part in parts.items():
            if part is not None and kind not in self.pattern.kinds:
                raise ConfigError(
                    f"ModelConfig.{fields[kind]} is set but pattern "
                    f"{self.hybrid_override_pattern!r} has no {kind.value!r} layer, so it would "
                    "have no effect; remove it"
                )

    @property
    def pattern(self) -> LayerPattern:
        """The parsed layer pattern."""
        return parse_pattern(self.hybrid_override_pattern)

    @property
    def num_layers(self) -> int:
        """Layers of the backbone, without the multi-token-prediction block."""
        return len(self.pattern.main)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends a sequence."""
        ids = self.eos_token_id
        return frozenset(ids if isinstance(ids, tuple) else (ids,))

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights."""
        if self.initializer_range is not None:
            return self.initializer_range
        return (0.8 / self.hidden_size) ** 0.5

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A named configuration: nano, super, ultra, small, tiny or qwen3-moe."""
        if name not in PRESETS:
            close = get_close_matches(name, PRESETS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"no preset {name!r}{hint}; presets are {', '.join(PRESETS)}")
        fields = dict(PRESETS[name])
        parts = {
            part: record(**fields.pop(part)) for part, record in _PARTS.items() if part in fields
        }
        return cls(**fields, **parts)


_PARTS = {"mamba": MambaConfig, "attention": AttentionConfig, "moe": MoEConfig, "mlp": MLPConfig}
