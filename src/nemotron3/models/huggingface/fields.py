"""Read the fields of a `config.json`, with aliases, defaults and errors that name the field."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from nemotron3.errors import ConfigError

Value = TypeVar("Value", int, float, bool, str)
Aliases = Mapping[str, tuple[str, ...]]
"""Other names of a field, by the name that is written."""


class Fields:
    """The fields of one configuration file.

    A field may occur under several of its names if all have the same value. Different values are an
    error, because it is unknown which of them other programs read.
    """

    def __init__(self, fields: Mapping[str, Any], where: str, aliases: Aliases) -> None:
        self.fields = fields
        self.where = where
        self.aliases = aliases

    def names(self, name: str) -> tuple[str, ...]:
        """Every name of a field."""
        return (name, *self.aliases.get(name, ()))

    def spelled(self, name: str) -> dict[str, Any]:
        """The names under which a field is present and not null, with their values."""
        return {
            spelling: self.fields[spelling]
            for spelling in self.names(name)
            if self.fields.get(spelling) is not None
        }

    def agreed(self, values: Mapping[str, Any]) -> Any:
        """The common value of several names, None for no names; ConfigError if they differ."""
        first, *others = list(values.items()) or [("", None)]
        for spelling, value in others:
            if value != first[1]:
                raise ConfigError(
                    f"{self.where}: {first[0]} is {first[1]!r} and {spelling} is {value!r}, two "
                    "names of one field; make them equal or remove the wrong one"
                )
        return first[1]

    def raw(self, name: str, *, default: Any = None) -> Any:
        """A field under any of its names."""
        value = self.agreed(self.spelled(name))
        return default if value is None else value

    def get(self, kind: type[Value], name: str, *, default: Value | None = None) -> Value:
        """A field as an int, float, bool or str; required if no default is given."""
        found = self.spelled(name)
        value = self.agreed(found)
        if value is None:
            if default is None:
                names = self.names(name)
                raise ConfigError(
                    f"{self.where} lacks {' (or '.join(names)}{')' * (len(names) - 1)}"
                )
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"{self.where}: {next(iter(found))} is {value!r}, but a {kind.__name__} is needed"
            )
        return value

    def require(self, name: str, allowed: Any, meaning: str) -> None:
        """Raise ConfigError unless a field has the only supported value, `allowed`."""
        for spelling, value in self.spelled(name).items():
            if value != allowed:
                raise ConfigError(
                    f"{self.where}: {spelling} is {value!r}; only {allowed!r} is supported "
                    f"({meaning})"
                )

    def special_tokens(self, *, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """The ids of special tokens, by field of `ModelConfig`; the arguments are the defaults."""
        return {
            "bos_token_id": self.get(int, "bos_token_id", default=bos),
            "eos_token_id": self._eos(eos),
            "pad_token_id": self.get(int, "pad_token_id", default=pad),
        }

    def _eos(self, default: int) -> int | tuple[int, ...]:
        value = self.raw("eos_token_id", default=default)
        if not isinstance(value, list):
            return self.get(int, "eos_token_id", default=default)
        if not value or not all(type(token) is int for token in value):
            raise ConfigError(
                f"{self.where}: eos_token_id is {value!r}, but an id or a list of ids is needed"
            )
        return value[0] if len(value) == 1 else tuple(value)


def updated(
    fields: Mapping[str, Any],
    *,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    aliases: Aliases,
) -> dict[str, Any]:
    """The fields of a file, with those changed that differ between two records.

    `before` are the fields of the record that was read, `after` those of the one to be saved. A
    field that changed loses its other names, so that no old value remains beside the new one.
    """
    changed = [
        name
        for name in (*before, *(name for name in after if name not in before))
        if name not in before or name not in after or before[name] != after[name]
    ]
    stale = {spelling for name in changed for spelling in (name, *aliases.get(name, ()))}
    kept = {name: value for name, value in fields.items() if name not in stale}
    return kept | {name: after[name] for name in changed if name in after}


def number(value: Any) -> float:
    """A number, or infinity in any of the spellings that JSON files use."""
    value = float(value["__float__"] if isinstance(value, dict) else value)
    # JSON has no infinity, so some files have a number larger than any step.
    return math.inf if value >= 1e30 else value
