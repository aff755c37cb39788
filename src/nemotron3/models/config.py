"""The configuration of a model: one record per kind of layer, and the pattern of layers.

The record of a kind of layer is in the file of its mixer. Fields have the names of the published
`config.json`; only `huggingface` uses other names. All checks run on construction.

    config = ModelConfig.preset("nano")
    wider = dataclasses.replace(config, hidden_size=4096)
"""

from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Any, Self, get_args, get_type_hints

from nemotron3.errors import ConfigError
from nemotron3.models.attention import AttentionConfig
from nemotron3.models.checks import require_positive
from nemotron3.models.experts import MoEConfig
from nemotron3.models.mamba2 import MambaConfig
from nemotron3.models.mixer import MixerConfig
from nemotron3.models.mlp import MLPConfig
from nemotron3.models.pattern import LayerPattern, parse_pattern
from nemotron3.models.presets import PRESETS

__all__ = ["AttentionConfig", "MLPConfig", "MambaConfig", "MoEConfig", "ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole language model.

    A subclass may have fields for further kinds of layers, each a `MixerConfig` or None.
    """

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
    """Longest context that the model supports; no tensor has this size."""
    bos_token_id: int = 1
    """Id of the token that begins a sequence."""
    eos_token_id: int | tuple[int, ...] = 2
    """Id of the token that ends a sequence, or the ids of several such tokens."""
    pad_token_id: int = 0
    """Id of the padding token, which is never predicted."""

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "layer_norm_epsilon")
        if not self.eos_token_ids:
            raise ConfigError("ModelConfig.eos_token_id is empty; name at least one token")
        if self.initializer_range is not None:
            require_positive(self, "initializer_range")
        fields = _mixer_fields(type(self))
        named = type(self).__name__
        for name, mixer in fields.items():
            if mixer.symbol in self.pattern.symbols and getattr(self, name) is None:
                raise ConfigError(
                    f"pattern {self.hybrid_override_pattern!r} has {mixer.symbol!r} layers but "
                    f"{named}.{name} is None; describe them there"
                )
            if mixer.symbol not in self.pattern.symbols and getattr(self, name) is not None:
                raise ConfigError(
                    f"{named}.{name} is set but pattern {self.hybrid_override_pattern!r} has no "
                    f"{mixer.symbol!r} layer, so it would have no effect; remove it"
                )

    @cached_property
    def pattern(self) -> LayerPattern:
        """The parsed layer pattern."""
        kinds = {mixer.symbol: mixer.label for mixer in _mixer_fields(type(self)).values()}
        return parse_pattern(self.hybrid_override_pattern, kinds)

    @property
    def continues_prefixes(self) -> bool:
        """Whether the backbone can be called with `SequenceLayout.prefixes`."""
        return all(mixer.continues_prefixes or not mixer.is_stateful for mixer in self.layers)

    @cached_property
    def mixers(self) -> dict[str, MixerConfig]:
        """The configuration of each kind of layer, by its character in the pattern."""
        fields = _mixer_fields(type(self))
        given = [getattr(self, name) for name in fields]
        return {mixer.symbol: mixer for mixer in given if mixer is not None}

    @property
    def layers(self) -> tuple[MixerConfig, ...]:
        """The configuration of each layer of the backbone."""
        return tuple(self.mixers[symbol] for symbol in self.pattern.main)

    @property
    def mtp_layers(self) -> tuple[MixerConfig, ...]:
        """The configuration of each layer of the multi-token-prediction block."""
        return tuple(self.mixers[symbol] for symbol in self.pattern.mtp)

    @property
    def num_layers(self) -> int:
        """Layers of the backbone, without the multi-token-prediction block."""
        return len(self.pattern.main)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids of all tokens that end a sequence."""
        ids = self.eos_token_id
        return frozenset(ids if isinstance(ids, tuple) else (ids,))

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights."""
        if self.initializer_range is not None:
            return self.initializer_range
        return (0.8 / self.hidden_size) ** 0.5

    @classmethod
    def preset(cls, name: str) -> Self:
        """A named configuration: nano, super, ultra, small, tiny or qwen3-moe."""
        if name not in PRESETS:
            close = get_close_matches(name, PRESETS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"no preset {name!r}{hint}; presets are {', '.join(PRESETS)}")
        fields = dict(PRESETS[name])
        parts: dict[str, Any] = {
            name: mixer(**fields.pop(name))
            for name, mixer in _mixer_fields(cls).items()
            if name in fields
        }
        return cls(**fields, **parts)


@cache
def _mixer_fields(config: type[ModelConfig]) -> dict[str, type[MixerConfig]]:
    """The fields of the kinds of layers, and the classes of their values."""
    fields: dict[str, type[MixerConfig]] = {}
    for name, hint in get_type_hints(config).items():
        for member in get_args(hint) or (hint,):
            if isinstance(member, type) and issubclass(member, MixerConfig):
                fields[name] = member
    symbols = Counter(mixer.symbol for mixer in fields.values())
    for name, mixer in fields.items():
        if len(mixer.symbol) != 1 or mixer.symbol == "/" or symbols[mixer.symbol] > 1:
            raise ConfigError(
                f"{mixer.__name__}.symbol is {mixer.symbol!r}, the character of field {name!r} of "
                f"{config.__name__}; give each kind of layer one of its own, and not '/'"
            )
    return fields
