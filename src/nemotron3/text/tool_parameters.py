"""The parameters that a tool declares, with their types.

`parameters` may be an object with `properties`, but also a reference to one (zod's named schemas),
a conjunction (`allOf`), or alternatives (`anyOf`); so a tool has one or more `ArgumentSet`s. The
parser of a call uses all of them, since it cannot know which one the model chose; a grammar has one
rule for each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from nemotron3.errors import DataError
from nemotron3.text.messages import Json, Tool
from nemotron3.text.parameter_types import ANYTHING, ParameterType, parameter_type, readable_type
from nemotron3.text.schemas import Conjunction, alternatives

_UNENFORCEABLE = frozenset(
    {"dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxProperties"}
    | {"minProperties", "not", "propertyNames", "then", "unevaluatedProperties"}
)

_ANY_NAME = {"type": "string"}  # zod's `propertyNames` of a record


@dataclass(frozen=True, kw_only=True)
class ArgumentSet:
    """One alternative of a tool's arguments: described ones by name, and the rule for others."""

    described: Mapping[str, Json]
    required: tuple[str, ...]
    undescribed: Json
    """Schema of arguments that are not described; false if there may be none."""
    patterns: Mapping[str, Json]
    """Schemas of arguments by a regular expression that matches their names."""
    takes_any: bool
    """Whether a call may give arguments that nothing describes, because nothing is described."""

    @property
    def names(self) -> tuple[str, ...]:
        """All known names, the described ones first."""
        return (*self.described, *(name for name in self.required if name not in self.described))

    def schema(self, name: str) -> Json:
        """The schema of one argument."""
        found = [part for pattern, part in self.patterns.items() if _matches(pattern, name)]
        if name in self.described:
            found.append(self.described[name])
        return {"allOf": found} if found else self.undescribed

    def undescribed_type(self, root: Mapping[str, Json]) -> ParameterType:
        """The type of an argument that nothing describes."""
        if self.patterns:
            raise DataError("patternProperties alone hold no call; describe the arguments")
        return parameter_type(self.undescribed, root)


class ToolParameters:
    """The names and types of a tool's parameters, for the parser of its calls."""

    def __init__(self, tool: Tool | None) -> None:
        self._root = (tool.parameters if tool is not None else None) or {}
        try:
            self._sets = argument_sets(self._root)
        except DataError:  # too complex: treated as if there were no schema
            self._sets = []
        self.names = frozenset(name for each in self._sets for name in each.names)
        self.type = cache(self._type)

    def _type(self, name: str) -> ParameterType:
        """The type by which a parameter's value is read."""
        schemas = [each.schema(name) for each in self._sets if name in each.names]
        schemas = schemas or [each.schema(name) for each in self._sets]
        found = readable_type({"anyOf": schemas}, self._root) if schemas else ANYTHING
        return ANYTHING if found.is_never else found


def argument_sets(parameters: Mapping[str, Json]) -> list[ArgumentSet]:
    """The alternative sets of arguments; a call uses one of them.

    Raises `DataError` if the schema is too complex.
    """
    return [
        _argument_set(conjunction)
        for conjunction in alternatives(parameters, parameters)
        if conjunction != ({"type": "null"},)
    ]


def argument_types(
    each: ArgumentSet, root: Mapping[str, Json]
) -> list[tuple[str, bool, ParameterType]]:
    """Each argument that has possible values: its name, whether it is required, and its type.

    Raises `DataError` if a required argument has no possible value.
    """
    found: list[tuple[str, bool, ParameterType]] = []
    for name in each.names:
        allowed = parameter_type(each.schema(name), root)
        is_required = name in each.required
        if allowed.is_never and is_required:
            raise DataError(
                f": parameter {name!r} is required and no value fits its schema",
                field=place_of(name, root),
            )
        if not allowed.is_never:
            found.append((name, is_required, allowed))
    return found


def place_of(name: str, parameters: Mapping[str, Json]) -> str:
    """Where a tool describes a parameter, for errors: a path that starts with `parameters`."""
    is_property = name in _named(parameters.get("properties"))
    return f"parameters.properties.{name}" if is_property else "parameters"


def check_enforceable(parameters: Mapping[str, Json]) -> None:
    """Refuse constraints on a tool's arguments that a grammar of calls cannot enforce."""
    for conjunction in alternatives(parameters, parameters):
        for schema in conjunction:
            keys = sorted(key for key in _UNENFORCEABLE & set(schema) if schema[key] != _ANY_NAME)
            if keys:
                raise DataError(
                    f"parameters has {keys[0]!r}, which cannot be enforced in a call; leave it "
                    f"out, or let the model decide to call"
                )


def _argument_set(conjunction: Conjunction) -> ArgumentSet:
    described: dict[str, Json] = {}
    patterns: dict[str, Json] = {}
    required: list[str] = []
    undescribed: list[Json] = []
    takes_any = True
    for schema in conjunction:
        for name, part in _named(schema.get("properties")).items():
            described[name] = {"allOf": [described[name], part]} if name in described else part
        for pattern, part in _named(schema.get("patternProperties")).items():
            patterns[pattern] = part
        listed = schema.get("required")
        if isinstance(listed, Sequence) and not isinstance(listed, str):
            names = cast(Sequence[Any], listed)
            required += [name for name in names if name not in required]
        others = schema.get("additionalProperties", True)
        undescribed.append(others)
        is_listed = "properties" in schema and "additionalProperties" not in schema
        takes_any = takes_any and others is not False and not is_listed
    return ArgumentSet(
        described=described,
        required=tuple(required),
        undescribed={"allOf": undescribed} if undescribed else True,
        patterns=patterns,
        takes_any=takes_any and not described and not required,
    )


def _named(value: Json) -> Mapping[str, Json]:
    return cast(Mapping[str, Json], value) if isinstance(value, Mapping) else {}


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False
