"""Whether a value fits a JSON schema: the keywords that tools and records of tasks need.

A small checker instead of a package: it runs for every rollout, its messages go to a model that
should learn from them, and a keyword that it does not know is an error of whoever wrote the schema,
never one that is passed over.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from nemotron3.errors import ConfigError

_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: (
        _TYPES["integer"](value) or (isinstance(value, float) and math.isfinite(value))
    ),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, Mapping),
}
_BOUNDS: dict[str, tuple[type, Callable[[Any, Any], bool]]] = {
    "minimum": (float, lambda value, bound: value >= bound),
    "maximum": (float, lambda value, bound: value <= bound),
    "minLength": (str, lambda value, bound: len(value) >= bound),
    "maxLength": (str, lambda value, bound: len(value) <= bound),
    "minItems": (list, lambda value, bound: len(value) >= bound),
    "maxItems": (list, lambda value, bound: len(value) <= bound),
}
_KEYWORDS = {"type", "enum", "const", "items", "properties", "required", "additionalProperties"}
_ANNOTATIONS = {"title", "description", "default", "examples", "$schema"}


def schema_error(value: Any, schema: Mapping[str, Any], where: str = "value") -> str | None:
    """What is wrong with a value, with its place; None where it fits.

    Raises `ConfigError` for a keyword that is not known. Properties that are not described are
    refused, whether or not the schema says `additionalProperties: false`, unless it says true.
    """
    unknown = sorted(set(schema) - _KEYWORDS - set(_BOUNDS) - _ANNOTATIONS)
    if unknown:
        raise ConfigError(f"the schema of {where} has {unknown[0]!r}, which is not supported")
    kinds = schema.get("type", [])
    listed = cast(list[str], [kinds] if isinstance(kinds, str) else list(kinds))
    if listed and not any(_TYPES[kind](value) for kind in listed):
        return f"{where} is not {' or '.join(listed)}"
    if "const" in schema and not _is_same(value, schema["const"]):
        return f"{where} is not {schema['const']!r}"
    if "enum" in schema and not any(_is_same(value, each) for each in schema["enum"]):
        return f"{where} is not one of {', '.join(map(str, schema['enum']))}"
    for keyword, (kind, fits) in _BOUNDS.items():
        kinds = (int, float) if kind is float else kind
        if keyword in schema and isinstance(value, kinds) and not fits(value, schema[keyword]):
            return f"{where} is against {keyword} {schema[keyword]}"
    if isinstance(value, Mapping):
        return _object_error(cast(Mapping[str, Any], value), schema, where)
    if isinstance(value, list):
        return _array_error(cast(list[Any], value), schema, where)
    return None


def _object_error(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties: Mapping[str, Any] = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{where} has no {name}"
    for name, part in value.items():
        if name in properties:
            error = schema_error(part, properties[name], name)
            if error:
                return error
        elif schema.get("additionalProperties", not properties) is not True:
            return f"{where} has {name}, which is not asked for"
    return None


def _array_error(value: Sequence[Any], schema: Mapping[str, Any], where: str) -> str | None:
    if "items" not in schema:
        return None
    errors = (schema_error(each, schema["items"], f"{where}[{i}]") for i, each in enumerate(value))
    return next((error for error in errors if error), None)


def _is_same(value: Any, other: Any) -> bool:
    """Equality that tells true from 1 and 1 from 1.0, as the types of a schema do."""
    if isinstance(value, list) and isinstance(other, list):
        pair = cast(list[Any], value), cast(list[Any], other)
        return len(pair[0]) == len(pair[1]) and all(map(_is_same, *pair))
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        left, right = cast(Mapping[str, Any], value), cast(Mapping[str, Any], other)
        return left.keys() == right.keys() and all(_is_same(left[k], right[k]) for k in left)
    return type(value) is type(other) and value == other
