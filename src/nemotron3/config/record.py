"""Nested configuration to JSON and back, with strict checks.

A run is replayed from its `run.json`, so a key that is misspelt, missing or of the wrong type must
be an error: a silent default would give another run under the same name. The annotations of the
dataclasses are the schema, and an error names the dotted path, the value and the nearest name.
Libraries for this accept unknown keys or coerce values ("3" to 3) unless each class is configured
not to, so this module is written by hand.

Types of fields: bool, int, float, str, None, Path, an enum, a literal, `Steps` or `Tokens`, a
dataclass, and tuples, `dict[str, X]` and unions of these. In a union, `kind: Literal[...]`
distinguishes dataclasses. JSON has no infinity: such floats are the strings "inf", "-inf", "nan".

    record = to_record(config)                    # dicts, lists, strings and numbers
    assert from_record(PretrainConfig, record) == config
"""

import dataclasses
import difflib
import enum
import math
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from nemotron3.config.units import Steps, Tokens
from nemotron3.errors import ConfigError

T = TypeVar("T")

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_record(config: Any) -> Any:
    """A configuration as JSON values: dicts, lists, strings, numbers, booleans and None."""
    match config:
        case enum.Enum():
            return config.value
        case None | bool() | int() | str():
            return config
        case float():
            return config if math.isfinite(config) else str(config)
        case Path() | Steps() | Tokens():
            return str(config)
        case tuple() | list():
            return [to_record(item) for item in cast("Iterable[Any]", config)]
        case Mapping():
            items = cast("Mapping[str, Any]", config).items()
            return {key: to_record(value) for key, value in items}
        case _ if dataclasses.is_dataclass(config):
            fields = [field for field in dataclasses.fields(config) if field.init]
            return {field.name: to_record(getattr(config, field.name)) for field in fields}
        case _:
            raise ConfigError(
                f"{config!r} of type {type(config).__name__} has no place in a record; "
                "use numbers, strings, paths, enums, tuples, dicts and dataclasses"
            )


def from_record(cls: type[T], record: Any, *, path: str = "") -> T:
    """Build `cls` from the output of `to_record`.

    Raises ConfigError for an unknown, missing or invalid field, with its dotted path below `path`.
    """
    return cast("T", _decode(cls, record, path))


def _decode(hint: Any, value: Any, path: str) -> Any:
    """Decode one value by its annotation; a value annotated `Any` is returned unchanged."""
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin is Literal:
        return _decode_literal(get_args(hint), value, path)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(hint), value, path)
    if origin is tuple or hint is tuple:
        return _decode_tuple(hint, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(path, value, "a JSON object")
        items = cast("dict[str, Any]", value).items()
        return {key: _decode(get_args(hint)[1], item, _join(path, key)) for key, item in items}
    if dataclasses.is_dataclass(hint) and hint not in (Steps, Tokens):
        return _decode_dataclass(cast("type[Any]", hint), value, path)
    return _decode_scalar(hint, value, path)


def _decode_scalar(hint: Any, value: Any, path: str) -> Any:
    """Decode a scalar. A bool is not an int here, and only int to float is coerced."""
    if hint in (bool, str, types.NoneType):
        if not isinstance(value, hint):
            raise _mismatch(path, value, "null" if hint is types.NoneType else hint.__name__)
        return value
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _mismatch(path, value, "int")
        return value
    if hint is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _mismatch(path, value, "float")
        return float(value)
    if not isinstance(hint, type):
        raise ConfigError(f"{path}: a field annotated {hint} cannot be read from a record")
    if issubclass(hint, enum.Enum):
        return _decode_literal(tuple(member.value for member in hint), value, path, build=hint)
    if issubclass(hint, Path | Steps | Tokens):
        if not isinstance(value, str):
            raise _mismatch(path, value, f"a string for {hint.__name__}")
        return _build(Path if issubclass(hint, Path) else hint.parse, path, value)
    raise ConfigError(f"{path}: a field of type {hint.__name__} cannot be read from a record")


def _decode_literal(
    choices: tuple[Any, ...], value: Any, path: str, *, build: Callable[[Any], Any] | None = None
) -> Any:
    """Decode one of `choices`, by equality and type (True is not 1)."""
    for choice in choices:
        if choice == value and type(choice) is type(value):
            return build(choice) if build else choice
    listed = ", ".join(repr(choice) for choice in choices)
    close = _close_match(value, choices)
    raise ConfigError(f"is {value!r}; it must be one of {listed}{close}", field=path or "record")


def _decode_tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    """Decode `tuple[X, ...]` of any length, or a tuple with one annotation per item."""
    if not isinstance(value, list | tuple):
        raise _mismatch(path, value, "a JSON array")
    items = list(cast("Iterable[Any]", value))
    hints = list(get_args(hint))
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = [hints[0]] * len(items)
    if len(hints) != len(items):
        raise _mismatch(path, value, f"an array of {len(hints)} items")
    pairs = zip(hints, items, strict=True)
    return tuple(
        _decode(item_hint, item, f"{path}[{i}]") for i, (item_hint, item) in enumerate(pairs)
    )


def _decode_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    """Decode a JSON object as the dataclass of its `kind`, another value as the first that fits."""
    configs = [m for m in members if dataclasses.is_dataclass(m) and m not in (Steps, Tokens)]
    others = [m for m in members if m not in configs]
    if isinstance(value, dict) and configs:
        return _decode_dataclass(
            _by_kind(configs, cast("dict[str, Any]", value), path), value, path
        )
    if types.NoneType in others:
        if value is None:
            return None
        others.remove(types.NoneType)
    if len(others) == 1 and not configs:
        return _decode(others[0], value, path)
    if sum(m in (str, float) or (isinstance(m, type) and issubclass(m, Path)) for m in others) > 1:
        raise ConfigError(f"{path}: JSON cannot tell the members of {members} apart")
    for member in sorted(others, key=lambda m: 2 if m is str else 1 if m in (float, Path) else 0):
        try:
            return _decode(member, value, path)
        except ConfigError:
            continue
    raise _mismatch(path, value, " or ".join(_name(member) for member in members))


def _by_kind(configs: list[Any], value: dict[str, Any], path: str) -> type[Any]:
    """The member of a union with the record's `kind`."""
    if len(configs) == 1:
        return configs[0]
    kinds = {k: c for c in configs for k in get_args(get_type_hints(c).get("kind"))}
    if "kind" not in value:
        where = _join(path, "kind")
        raise ConfigError(f"is missing; it must be one of {sorted(kinds)}", field=where)
    return kinds[_decode_literal(tuple(kinds), value["kind"], _join(path, "kind"))]


def _decode_dataclass(cls: type[Any], value: Any, path: str) -> Any:
    """Decode a dataclass from an object with exactly its fields."""
    if not isinstance(value, dict):
        raise _mismatch(path, value, f"a JSON object for {cls.__name__}")
    record = cast("dict[str, Any]", value)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    hints = get_type_hints(cls)
    if "kind" in names and "kind" in record:  # first: another kind has other fields
        _decode(hints["kind"], record["kind"], _join(path, "kind"))
    for key in record:
        if key not in names:
            close = _close_match(key, names) or f"; it has {', '.join(names)}"
            raise ConfigError(
                f"is {record[key]!r}, but {cls.__name__} has no such field{close}",
                field=_join(path, key),
            )
    for name in names:
        if name not in record:
            raise ConfigError(
                f"is missing; {cls.__name__} needs it in a record", field=_join(path, name)
            )
    fields = {name: _decode(hints[name], record[name], _join(path, name)) for name in names}
    return _build(cls, path, **fields)


def _build(make: Callable[..., Any], path: str, /, *args: Any, **fields: Any) -> Any:
    """Call a constructor, and add the path to its errors."""
    try:
        return make(*args, **fields)
    except ConfigError as error:
        if not path:
            raise
        raise error.under(path) from error


def _mismatch(path: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"is {value!r} of type {type(value).__name__}; it must be {wanted}",
        field=path or "record",
    )


def _close_match(value: Any, choices: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _name(hint: Any) -> str:
    return "null" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
