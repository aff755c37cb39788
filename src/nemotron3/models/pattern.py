"""The layer pattern: which mixer each layer has, in Megatron's notation.

One character a layer, `M` Mamba-2, `*` attention, `E` mixture of experts, `-` dense feed-forward,
and after each `/` the layers of one multi-token-prediction depth. Depths share one physical block,
so all of them read the same: `MEMEM*EME/*E/*E` is nine layers and two depths of the block `*E`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from nemotron3.errors import ConfigError


class LayerKind(Enum):
    """What a layer's mixer is; the value is its character in a pattern."""

    MAMBA = "M"
    ATTENTION = "*"
    EXPERTS = "E"
    MLP = "-"

    @property
    def is_stateful(self) -> bool:
        """Whether a token's output depends on the tokens before it."""
        return self in (LayerKind.MAMBA, LayerKind.ATTENTION)


_MEANINGS = ", ".join(f"{kind.value} ({kind.name.lower()})" for kind in LayerKind)
_ELSEWHERE = {
    "G": "gated DeltaNet",
    "D": "sparse attention",
    "+": "multi-head latent attention",
}


@dataclass(frozen=True)
class LayerPattern:
    """A parsed pattern."""

    main: tuple[LayerKind, ...]
    """Mixers of the backbone, first to last."""
    mtp: tuple[LayerKind, ...]
    """Mixers of the shared multi-token-prediction block; empty without one."""
    num_mtp_depths: int
    """How many tokens beyond the next the block is trained to predict."""

    def __str__(self) -> str:
        main, mtp = ("".join(kind.value for kind in part) for part in (self.main, self.mtp))
        return "/".join([main] + [mtp] * self.num_mtp_depths)

    @property
    def kinds(self) -> set[LayerKind]:
        """Every kind of mixer that occurs."""
        return {*self.main, *self.mtp}


def last_stateful_layer(kinds: Sequence[LayerKind]) -> int:
    """The last layer with a state; the first if none has one.

    Behind it a token can be left out, and no other notices.
    """
    return max((i for i, kind in enumerate(kinds) if kind.is_stateful), default=0)


def parse_pattern(pattern: str) -> LayerPattern:
    """Read a pattern string; a ConfigError says which character, where, and what is allowed."""
    main, *depths = pattern.split("/")
    if not main:
        raise ConfigError(
            f"layer pattern {pattern!r} has no layers; it is one character a layer from {_MEANINGS}"
        )
    if any(depth != depths[0] for depth in depths):
        raise ConfigError(
            f"layer pattern {pattern!r} gives its multi-token-prediction depths different layers "
            f"({', '.join(map(repr, depths))}); depths share one block, so repeat the same part"
        )
    if depths and not depths[0]:
        raise ConfigError(
            f"layer pattern {pattern!r} has a '/' with nothing after it; write the layers of the "
            "multi-token-prediction block there, as in 'ME*E/*E', or drop the '/'"
        )
    return LayerPattern(
        main=_parse_part(main, pattern, 0),
        mtp=_parse_part(depths[0], pattern, len(main) + 1) if depths else (),
        num_mtp_depths=len(depths),
    )


def _parse_part(part: str, pattern: str, offset: int) -> tuple[LayerKind, ...]:
    kinds = []
    for index, character in enumerate(part):
        try:
            kinds.append(LayerKind(character))
        except ValueError:
            raise ConfigError(_unknown(character, offset + index, pattern)) from None
    return tuple(kinds)


def _unknown(character: str, position: int, pattern: str) -> str:
    message = (
        f"layer pattern {pattern!r} has {character!r} at position {position}; allowed are "
        f"{_MEANINGS}, and '/' before each multi-token-prediction depth"
    )
    if character in _ELSEWHERE:
        return (
            f"{message} (Megatron's {character!r}, {_ELSEWHERE[character]}, is not in Nemotron 3)"
        )
    if character == "|":
        return f"{message} (pipeline boundaries belong to the run, not to the model: leave '|' out)"
    if character in "meAa":
        meant = "*" if character in "Aa" else character.upper()
        return f"{message} (did you mean {meant!r}?)"
    return message
