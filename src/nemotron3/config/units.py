"""Durations with their unit: `Steps(200)` and `Tokens(1_500_000)`.

A bare `save_interval=200` could mean steps or tokens, and either run would start. A duration with
its unit cannot be misread. Its text form (`"200 steps"`, `"1.5M tokens"`) is used on the command
line and in `run.json`.

    Tokens.parse("1.5M")                                        # Tokens(count=1500000)
    parse_duration("10k steps")                                 # Steps(count=10000)
    Tokens(1_500_000).in_steps(tokens_per_step=8192)            # 184, rounded up
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Self, TypeAlias

from nemotron3.errors import ConfigError

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PATTERN = re.compile(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([kMBT]?)\s*(steps?|tokens?)?\s*")


def _split(text: str) -> tuple[int, str | None]:
    """`"1.5M tokens"` as (1500000, "tokens"); the unit is None if the text has none."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"duration {text!r} cannot be read; write a number, optionally k, M, B or T, and a "
            "unit, for example '200 steps' or '1.5M tokens'"
        )
    digits, suffix, unit = match.groups()
    count = Fraction(re.sub("[_,]", "", digits)) * _SUFFIXES[suffix]
    if count.denominator != 1:
        raise ConfigError(f"duration {text!r} is {float(count)}, which is not a whole number")
    return int(count), unit and unit.rstrip("s") + "s"


@dataclass(frozen=True, order=True)
class _Count:
    count: int
    """The number; zero or more."""

    unit: ClassVar[str]

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"a duration of {self.count} {self.unit} is negative; use 0 or more")

    def __str__(self) -> str:
        return f"{self.count} {self.unit}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text form; the unit is optional. Raises ConfigError if it is invalid."""
        count, unit = _split(text)
        if unit not in (None, cls.unit):
            raise ConfigError(f"duration {text!r} is in {unit}; this setting counts {cls.unit}")
        return cls(count)


class Steps(_Count):
    """A number of optimizer updates."""

    unit = "steps"

    def in_steps(self, *, tokens_per_step: int) -> int:
        """The number of updates, which does not depend on `tokens_per_step`."""
        del tokens_per_step
        return self.count


class Tokens(_Count):
    """A number of training tokens."""

    unit = "tokens"

    def in_steps(self, *, tokens_per_step: int) -> int:
        """The smallest number of updates with at least this many tokens."""
        return -(-self.count // tokens_per_step)


Duration: TypeAlias = Steps | Tokens


def parse_duration(text: str) -> Duration:
    """Parse `"200"`, `"10k steps"` or `"1.5M tokens"`; a bare number counts steps."""
    _, unit = _split(text)
    return Tokens.parse(text) if unit == "tokens" else Steps.parse(text)
