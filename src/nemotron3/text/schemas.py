"""A JSON schema taken apart: references followed, combinations multiplied out, closed in itself.

`alternatives` turns a schema into the plain schemas of which a value has to fit one: each is a
conjunction of mappings without `$ref`, `allOf`, `anyOf`, `oneOf`. Whoever has to know what a schema
allows at its top (a type, a list of choices) reads these and nothing else. `oneOf` is taken for
`anyOf`: that exactly one branch fits is left to whoever validates. `nullable` (OpenAPI) is one more
alternative.

`closed` makes of schemas that point into a larger document one that stands alone, with the
definitions that it reaches and without what only describes.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, cast

from nemotron3.errors import DataError
from nemotron3.text.messages import Json
from nemotron3.text.string_regex import format_regex, held_pattern

Conjunction = tuple[Mapping[str, Json], ...]
"""Plain schemas that hold together."""

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
    """The plain schemas of which a value has to fit one; none where no value fits.

    `root` is the document in which `$ref` looks; a reference that leads nowhere stays in its plain
    schema. Raises `DataError` where they are too many to be told.
    """
    return _Alternatives(root or {}).of(schema, frozenset())


def closed(schemas: Sequence[Conjunction], root: Mapping[str, Json] | None) -> dict[str, Json]:
    """One schema, for any of these, in which every `$ref` leads to a definition of its own.

    Raises `DataError` for a reference that leads nowhere.
    """
    return _Closing(root or {}).of(schemas)


class _Alternatives:
    def __init__(self, root: Mapping[str, Json]) -> None:
        self._root = root
        self._steps = 0

    def of(self, schema: Json, seen: frozenset[str]) -> list[Conjunction]:
        self._steps += 1
        if self._steps > _MAX_STEPS or len(seen) > _MAX_DEPTH:
            raise DataError("a schema refers to others too often to be followed; write it flatter")
        if schema is False:
            return []
        if not isinstance(schema, Mapping):
            return [()]
        given = cast(Mapping[str, Json], schema)
        factors = [self._plain(given, seen)]
        for part in _schemas(given.get("allOf")):
            factors.append(self.of(part, seen))
        for key in ("anyOf", "oneOf"):
            if isinstance(given.get(key), list):
                factors.append([c for part in _schemas(given[key]) for c in self.of(part, seen)])
        found: list[Conjunction] = [()]
        for factor in factors:
            if len(found) * len(factor) > _MAX_ALTERNATIVES:
                raise DataError(
                    f"a schema has more than {_MAX_ALTERNATIVES} alternatives; write it flatter"
                )
            found = [(*left, *right) for left, right in product(found, factor)]
        return [*found, ({"type": "null"},)] if given.get("nullable") is True else found

    def _plain(self, given: Mapping[str, Json], seen: frozenset[str]) -> list[Conjunction]:
        own = {key: value for key, value in given.items() if key not in _COMBINING}
        reference = given.get("$ref")
        if not isinstance(reference, str):
            return [(own,)]
        target = _target(reference, self._root)
        if target is None:
            return [({**own, "$ref": reference},)]
        if reference in seen:
            return []  # what fits only if it fits is no alternative
        reached = self.of(target, seen | {reference})
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
        given = cast(Mapping[str, Json], schema)
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
    """What a reference leads to in the document; None for nothing."""
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


def _patterns(schema: Mapping[str, Json]) -> list[str]:
    """What a string has to match; of formats our expressions, so that all texts are held alike."""
    pattern, form = held_pattern(schema), format_regex(schema)
    found = [] if pattern is None else [pattern]
    return found if form is None else [*found, f"^(?:{form})$"]
