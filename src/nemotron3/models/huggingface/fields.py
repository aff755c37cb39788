"""Reading a `config.json` by field, with its aliases, defaults and plain errors."""

import math
from typing import Any, TypeVar

from nemotron3.errors import ConfigError

Value = TypeVar("Value", int, float, bool, str)


class Fields:
    """The fields of one configuration file."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def raw(self, *names: str, default: Any = None) -> Any:
        """The first of several spellings that is present and not null."""
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        return default

    def get(self, kind: type[Value], *names: str, default: Value | None = None) -> Value:
        """A field as an int, float, bool or str; required where no default is given."""
        value = self.raw(*names)
        if value is None:
            if default is None:
                raise ConfigError(
                    f"{self.where} lacks {' (or '.join(names)}{')' * (len(names) - 1)}"
                )
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"{self.where}: {names[0]} is {value!r}, but a {kind.__name__} is needed"
            )
        return value

    def require(self, name: str, allowed: Any, meaning: str) -> None:
        """Refuse a value that would change the arithmetic in a way the model does not have."""
        value = self.raw(name, default=allowed)
        if value != allowed:
            raise ConfigError(
                f"{self.where}: {name} is {value!r}; only {allowed!r} is supported ({meaning})"
            )


def number(value: Any) -> float:
    """A number in any of the spellings that JSON files use for infinity."""
    value = float(value["__float__"] if isinstance(value, dict) else value)
    # JSON has no infinity, so some files write a number that no step ever reaches.
    return math.inf if value >= 1e30 else value
