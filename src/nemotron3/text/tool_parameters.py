"""The parameters that a tool declares, with their types.

`parameters` may be an object with `properties`, but also a reference to one (zod's named schemas),
several that hold together, or several to choose from; so a tool has one or more `ArgumentSet`s. A
call is read by all of them, since nobody knows yet which it is; a grammar takes one after the
other.
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

_UNHELD = frozenset(
    {"dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxProperties"}
    | {"minProperties", "not", "propertyNames", "then", "unevaluatedProperties"}
)

_ANY_NAME = {"type": "string"}  # zod's `propertyNames` of a record


@dataclass(frozen=True, kw_only=True)
class ArgumentSet:
    """Arguments that go together: those described, by name, and what any other may be."""

    described: Mapping[str, Json]
    required: tuple[str, ...]
    undescribed: Json
    """Schema of arguments that are not described; false where there may be none."""
    patterns: Mapping[str, Json]
    """Schemas of arguments by an expression that their name matches."""
    takes_any: bool
    """Whether a call may give arguments that nothing describes, because nothing is described."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is known, those described first."""
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
    """What is known of a tool's parameters, for whoever reads a call of it."""

    def __init__(self, tool: Tool | None) -> None:
        self._root = (tool.parameters if tool is not None else None) or {}
        try:
            self._sets = argument_sets(self._root)
        except DataError:  # more than can be told: nothing is known, as without a schema
            self._sets = []
        self.names = frozenset(name for each in self._sets for name in each.names)
        self.type = cache(self._type)

    def _type(self, name: str) -> ParameterType:
        """How a parameter's value is read."""
        schemas = [each.schema(name) for each in self._sets if name in each.names]
        schemas = schemas or [each.schema(name) for each in self._sets]
        found = readable_type({"anyOf": schemas}, self._root) if schemas else ANYTHING
        return ANYTHING if found.is_never else found


def argument_sets(parameters: Mapping[str, Json]) -> list[ArgumentSet]:
    """The sets of arguments of which a call has one.

    Raises `DataError` where they cannot be told.
    """
    return [
        _argument_set(conjunction)
        for conjunction in alternatives(parameters, parameters)
        if conjunction != ({"type": "null"},)
    ]


def held_types(
    each: ArgumentSet, root: Mapping[str, Json]
) -> list[tuple[str, bool, ParameterType]]:
    """Name, whether it is required, and type of each argument that can be given.

    Raises `DataError` where a required one can have no value.
    """
    found: list[tuple[str, bool, ParameterType]] = []
    for name in each.names:
        held = parameter_type(each.schema(name), root)
        is_required = name in each.required
        if held.is_never and is_required:
            raise DataError(
                f": parameter {name!r} is required and no value fits its schema",
                field=place_of(name, root),
            )
        if not held.is_never:
            found.append((name, is_required, held))
    return found


def place_of(name: str, parameters: Mapping[str, Json]) -> str:
    """Where a tool describes a parameter, for errors: `parameters`, or below it where it can be."""
    is_property = name in _named(parameters.get("properties"))
    return f"parameters.properties.{name}" if is_property else "parameters"


def assert_held(parameters: Mapping[str, Json]) -> None:
    """Refuse what a grammar of calls cannot hold a tool's arguments to."""
    for conjunction in alternatives(parameters, parameters):
        for schema in conjunction:
            unheld = sorted(key for key in _UNHELD & set(schema) if schema[key] != _ANY_NAME)
            if unheld:
                raise DataError(
                    f"parameters has {unheld[0]!r}, to which no call can be held; leave it out, "
                    f"or let the model decide to call"
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
