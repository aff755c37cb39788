"""Checks that configurations of several mixers share; each names the field and its bound."""

from typing import Any

from nemotron3.errors import ConfigError


def require_positive(owner: object, *names: str) -> None:
    """Raise ConfigError for fields that are not above 0."""
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ConfigError(f"{type(owner).__name__}.{name} is {value}; it must be positive")


def require_divides(owner: Any, whole: str, part: str) -> None:
    """Raise ConfigError if `part` does not divide `whole`."""
    if getattr(owner, whole) % getattr(owner, part):
        raise ConfigError(
            f"{whole} = {getattr(owner, whole)} is not divisible by {part} = "
            f"{getattr(owner, part)}; change one of the two"
        )


def require_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError for a field whose value is not one of `choices`."""
    value = getattr(owner, name)
    if value not in choices:
        raise ConfigError(
            f"{type(owner).__name__}.{name} is {value!r}; choose from {', '.join(choices)}"
        )
