"""The layer pattern: the mixer of each layer, in Megatron's notation.

There is one character for each layer: `M` is Mamba-2, `*` attention, `E` mixture of experts, `-`
dense feed-forward. After each `/` follow the layers of one depth of multi-token prediction. Depths
share one physical block, so they are all equal: `MEMEM*EME/*E/*E` has nine layers, and two depths
of the block `*E`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nemotron3.errors import ConfigError

_ELSEWHERE = {
    "G": "gated DeltaNet",
    "D": "sparse attention",
    "+": "multi-head latent attention",
}


@dataclass(frozen=True)
class LayerPattern:
    """A parsed pattern."""

    main: tuple[str, ...]
    """Characters of the backbone's layers, first to last."""
    mtp: tuple[str, ...]
    """Characters of the layers of the shared MTP block; empty without one."""
    num_mtp_depths: int
    """Number of tokens beyond the next one that the block is trained to predict."""

    def __str__(self) -> str:
        return "/".join(["".join(self.main)] + ["".join(self.mtp)] * self.num_mtp_depths)

    @property
    def symbols(self) -> set[str]:
        """All characters in the pattern."""
        return {*self.main, *self.mtp}


def parse_pattern(pattern: str, kinds: Mapping[str, str]) -> LayerPattern:
    """Parse a pattern string; `kinds` are the names of layers by their characters.

    Raises ConfigError with the wrong character, its position, and the allowed ones.
    """
    main, *depths = pattern.split("/")
    if not main:
        raise ConfigError(
            f"layer pattern {pattern!r} has no layers; it is one character a layer from "
            f"{_meanings(kinds)}"
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
        main=_parse_part(main, pattern, 0, kinds),
        mtp=_parse_part(depths[0], pattern, len(main) + 1, kinds) if depths else (),
        num_mtp_depths=len(depths),
    )


def _parse_part(part: str, pattern: str, offset: int, kinds: Mapping[str, str]) -> tuple[str, ...]:
    for index, character in enumerate(part):
        if character not in kinds:
            raise ConfigError(_unknown(character, offset + index, pattern, kinds))
    return tuple(part)


def _meanings(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{symbol} ({label})" for symbol, label in kinds.items())


def _unknown(character: str, position: int, pattern: str, kinds: Mapping[str, str]) -> str:
    message = (
        f"layer pattern {pattern!r} has {character!r} at position {position}; allowed are "
        f"{_meanings(kinds)}, and '/' before each multi-token-prediction depth"
    )
    if character in _ELSEWHERE:
        return (
            f"{message} (Megatron's {character!r}, {_ELSEWHERE[character]}, is not in Nemotron 3)"
        )
    if character == "|":
        return f"{message} (pipeline boundaries belong to the run, not to the model: leave '|' out)"
    meant = "*" if character in "Aa" else character.upper()
    if meant in kinds:
        return f"{message} (did you mean {meant!r}?)"
    return message
