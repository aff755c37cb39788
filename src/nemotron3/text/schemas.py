"""Normalise JSON schemas: resolve references and expand combinations.

`alternatives` turns a schema into a list of plain schemas; a value must fit one of them. Each is a
conjunction of mappings without `$ref`, `allOf`, `anyOf`, `oneOf`. The other modules read what a
schema allows at its top level (types, listed values) from these. `oneOf` is treated as `anyOf`:
that exactly one branch fits is left to validation by the tool. `nullable` (OpenAPI) is one more
alternative.

`closed` turns schemas that refer to a larger document into one self-contained schema, with the
definitions that it needs and without annotations such as descriptions.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, cast

from nemotron3.errors import DataError
from nemotron3.text.messages import Json
from nemotron3.text.string_regex import format_regex, string_pattern

Conjunction = tuple[Mapping[str, Json], ...]
"""Plain schemas, all of which must hold."""

_MAX_ALTERNATIVES = 4096
_MAX_STEPS = 20_000  # schemas may refer to each other in every order
_MAX_DEPTH = 100  # of references, and of schemas within schemas
_COMBINING = frozenset({"$ref", "allOf", "anyOf", "oneOf", "nullable"})
_DESCRIBING = frozenset(
    {"$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType"}
    | {"default", "definitions", "deprecated", "description", "discriminator", "example"}
    | {"examples", "readOnly", "title", "writeOnly"}
)
_OF_SCHEMAS_BY_NAME = frozenset({"dependentSchemas", "patternProperties", "properties"})


def alternatives(schema: Json, root: Mapping[str, Json] | None) -> list[Conjunction]:
    """The plain schemas of `schema`; a value must fit one of them. Empty if no value fits.

    `$ref` refers to the document `root`; a reference without a target stays in its plain schema.
    Raises `DataError` if the schema is too complex.
    """
    return _Alternatives(root or {}).of(schema, frozenset(), 0)


def closed(schemas: Sequence[Conjunction], root: Mapping[str, Json] | None) -> dict[str, Json]:
    """One self-contained schema that any of these satisfies: its `$ref`s refer to its own `$defs`.

    Raises `DataError` for a reference without a target.
    """
    return _Closing(root or {}).of(schemas)


class _Alternatives:
    def __init__(self, root: Mapping[str, Json]) -> None:
        self._root = root
        self._steps = 0

    def of(self, schema: Json, seen: frozenset[str], depth: int) -> list[Conjunction]:
        self._steps += 1
        if self._steps > _MAX_STEPS or depth > _MAX_DEPTH:
            raise DataError("a schema refers to others too often to be followed; write it flatter")
        if schema is False:
            return []
        if not isinstance(schema, Mapping):
            return [()]
        given = cast(Mapping[str, Json], schema)
        factors = [self._plain(given, seen, depth)]
        for part in _schemas(given.get("allOf")):
            factors.append(self.of(part, seen, depth + 1))
        for key in ("anyOf", "oneOf"):
            if isinstance(given.get(key), list):
                factors.append(self._any(given[key], seen, depth + 1))
        found: list[Conjunction] = [()]
        for factor in factors:
            if len(found) * len(factor) > _MAX_ALTERNATIVES:
                raise DataError(
                    f"a schema has more than {_MAX_ALTERNATIVES} alternatives; write it flatter"
                )
            found = [(*left, *right) for left, right in product(found, factor)]
        return [*found, ({"type": "null"},)] if given.get("nullable") is True else found

    def _any(self, listed: Json, seen: frozenset[str], depth: int) -> list[Conjunction]:
        return [found for part in _schemas(listed) for found in self.of(part, seen, depth)]

    def _plain(
        self, given: Mapping[str, Json], seen: frozenset[str], depth: int
    ) -> list[Conjunction]:
        own = {key: value for key, value in given.items() if key not in _COMBINING}
        reference = given.get("$ref")
        if not isinstance(reference, str):
            return [(own,)]
        target = _target(reference, self._root)
        if target is None:
            return [({**own, "$ref": reference},)]
        if reference in seen:
            return []  # a schema that refers to itself adds no alternative
        reached = self.of(target, seen | {reference}, depth + 1)
        return [(own, *conjunction) for conjunction in reached]


class _Closing:
    def __init__(self, root: Mapping[str, Json]) -> None:
        self._root = root
        self._names: dict[str, str] = {}
        self._definitions: dict[str, Json] = {}

    def of(self, schemas: Sequence[Conjunction]) -> dict[str, Json]:
        whole = [self._together(conjunction) for conjunction in schemas]
        found = whole[0] if len(whole) == 1 else {"anyOf": whole}
        waiting = iter(self._names.copy().items())
        while len(self._definitions) < len(self._names):
            for reference, name in waiting:
                target = _target(reference, self._root)
                if target is None:
                    raise DataError(
                        f"$ref {reference!r} leads nowhere in the tool's parameters; write "
                        f"'#/$defs/NAME' and define NAME there"
                    )
                self._definitions[name] = self._rewritten(target, 0)
            waiting = iter(list(self._names.items())[len(self._definitions) :])
        return {**found, "$defs": self._definitions} if self._definitions else found

    def _together(self, conjunction: Conjunction) -> dict[str, Json]:
        parts = [self._rewritten(part, 0) for part in conjunction]
        parts = [part for part in parts if part]
        return parts[0] if len(parts) == 1 else {"allOf": parts}

    def _rewritten(self, schema: Json, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise DataError(f"a schema is more than {_MAX_DEPTH} deep; write it flatter")
        if not isinstance(schema, Mapping):
            return schema
        given = self._with_names(cast(Mapping[str, Json], schema))
        found = {
            key: self._value(key, value, depth + 1)
            for key, value in given.items()
            if key not in _DESCRIBING and key not in ("nullable", "pattern", "format")
        }
        patterns = _patterns(given)
        if patterns:
            found["pattern"] = patterns[0]
        if patterns[1:]:
            found["allOf"] = [*found.get("allOf", []), *({"pattern": p} for p in patterns[1:])]
        if given.get("nullable") is True:
            return {"anyOf": [found, {"type": "null"}]}
        return found

    def _with_names(self, schema: Mapping[str, Json]) -> Mapping[str, Json]:
        """A schema without `propertyNames`, if that only lists names or requires strings."""
        if "propertyNames" not in schema:
            return schema
        listed: list[Json] = []
        for conjunction in alternatives(schema["propertyNames"], self._root):
            lists = [_listed(part) for part in conjunction if {"enum", "const"} & set(part)]
            if not lists:
                is_any = all(set(part) - _DESCRIBING <= {"type"} for part in conjunction)
                others = {key: schema[key] for key in schema if key != "propertyNames"}
                return others if is_any else schema
            listed += [name for name in lists[0] if all(name in each for each in lists)]
        given = cast(Mapping[str, Json], schema.get("properties") or {})
        value = schema.get("additionalProperties", True)
        names = [name for name in listed if isinstance(name, str)]
        return {
            **{key: schema[key] for key in schema if key != "propertyNames"},
            "properties": {name: given.get(name, value) for name in names},
            "additionalProperties": False,
        }

    def _value(self, key: str, value: Json, depth: int) -> Json:
        if key == "$ref" and isinstance(value, str):
            name = self._names.setdefault(value, f"r{len(self._names)}")
            return f"#/$defs/{name}"
        if key in ("const", "enum"):
            return value
        if key in _OF_SCHEMAS_BY_NAME and isinstance(value, Mapping):
            named = cast(Mapping[str, Json], value)
            return {name: self._rewritten(part, depth) for name, part in named.items()}
        if isinstance(value, list):
            return [self._rewritten(part, depth) for part in cast(list[Json], value)]
        return self._rewritten(value, depth)


def _target(reference: str, root: Mapping[str, Json]) -> Json:
    """The target of a reference in the document, or None."""
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return None
    target: Any = root
    for step in reference[2:].split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping):
            target = cast(Mapping[str, Any], target).get(key)
        elif isinstance(target, list) and key.isdecimal() and int(key) < len(cast(Any, target)):
            target = cast(list[Any], target)[int(key)]
        else:
            return None
    return cast(Json, target) if isinstance(target, Mapping | bool) else None


def _schemas(listed: Json) -> list[Json]:
    return cast(list[Json], listed) if isinstance(listed, list) else []


def _listed(schema: Mapping[str, Json]) -> list[Json]:
    """The values in a plain schema's `enum` or `const`."""
    listed = schema.get("enum")
    return cast(list[Json], listed) if isinstance(listed, list) else [schema.get("const")]


def _patterns(schema: Mapping[str, Json]) -> list[str]:
    """The patterns that a string must match; a format uses the same expression as in calls."""
    pattern, form = string_pattern(schema), format_regex(schema)
    found = [] if pattern is None else [pattern]
    return found if form is None else [*found, f"^(?:{form})$"]
