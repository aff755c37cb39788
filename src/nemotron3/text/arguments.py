"""The value of a tool's argument from the text that a model wrote for it.

The family's calls carry text alone; the type is in the tool's JSON schema. So a value is read by
its schema, and the most particular type that fits wins: null, boolean, integer, number, array,
object, string. What fits none of the allowed types stays the text it was: a wrong argument that
the caller can see is better than a lost one. Python's spellings (`True`, `None`, `{'a': 1}`) are
read beside JSON's, because the template itself writes earlier calls that way.

Understood of JSON schema: `type` (one or several), `enum`, `const`, `anyOf`, `oneOf`, `allOf`,
`nullable`, and `$ref` within the tool's own parameters. Nothing is validated; that is the tool's.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from nemotron3.text.messages import Json
from nemotron3.text.tool_listing import write_argument

_INTEGER = re.compile(r"[-+]?\d+(\.0+)?\Z", re.ASCII)
_TYPES = ("null", "boolean", "integer", "number", "array", "object", "string")
_MAX_DEPTH = 16  # of references and alternatives: schemas may refer to themselves
_NONE = object()


def read_argument(
    text: str, schema: Mapping[str, Json] | None, *, root: Mapping[str, Json] | None = None
) -> Json:
    """The value that `text` stands for under a parameter's schema.

    `root` is the tool's `parameters`, where `$ref` looks. Without a schema the text is read as
    JSON where it is JSON, else it is a string.
    """
    if schema is None:
        value = _load_json(text)
        return text if value is _NONE else value
    for choice in _choices(schema, root, 0):
        if text == write_argument(choice) or (
            not isinstance(choice, str) and text.strip() == json.dumps(choice)
        ):
            return choice
    types = allowed_types(schema, root=root)
    for name in _TYPES:
        if name in types and name != "string":
            value = _read_as(name, text.strip())
            if value is not _NONE:
                return value
    if types:
        return text
    value = _load_json(text)
    return text if value is _NONE else value


def is_plain_text(
    schema: Mapping[str, Json] | None, *, root: Mapping[str, Json] | None = None
) -> bool:
    """Whether any text is its own value, so that it need not be whole to be passed on."""
    return (
        schema is not None
        and allowed_types(schema, root=root) == {"string"}
        and not any(not isinstance(choice, str) for choice in _choices(schema, root, 0))
    )


def allowed_types(
    schema: Mapping[str, Json], *, root: Mapping[str, Json] | None = None
) -> set[str]:
    """The JSON types that a schema allows; empty where it says nothing of them."""
    return _types(schema, root, 0)


def _types(schema: Mapping[str, Json], root: Mapping[str, Json] | None, depth: int) -> set[str]:
    schema = _resolved(schema, root)
    named = schema.get("type")
    found: set[str] = set()
    if isinstance(named, str):
        found.add(named)
    elif isinstance(named, Sequence):
        found.update(name for name in cast(Sequence[Any], named) if isinstance(name, str))
    if not found and depth < _MAX_DEPTH:
        for branch in _branches(schema):
            found |= _types(branch, root, depth + 1)
    if found and schema.get("nullable") is True:
        found.add("null")
    return found & set(_TYPES)


def _choices(schema: Mapping[str, Json], root: Mapping[str, Json] | None, depth: int) -> list[Json]:
    schema = _resolved(schema, root)
    listed = schema.get("enum")
    found: list[Json] = list(cast(list[Json], listed)) if isinstance(listed, list) else []
    if "const" in schema:
        found.append(schema["const"])
    if depth < _MAX_DEPTH:
        for branch in _branches(schema):
            found += _choices(branch, root, depth + 1)
    return found


def _branches(schema: Mapping[str, Json]) -> list[Mapping[str, Json]]:
    found: list[Mapping[str, Json]] = []
    for key in ("anyOf", "oneOf", "allOf"):
        listed = schema.get(key)
        if isinstance(listed, list):
            branches = cast(list[Any], listed)
            found += [cast(Mapping[str, Json], b) for b in branches if isinstance(b, Mapping)]
    return found


def _resolved(schema: Mapping[str, Json], root: Mapping[str, Json] | None) -> Mapping[str, Json]:
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/") or root is None:
            return schema
        target: Any = root
        for step in reference[2:].split("/"):
            key = step.replace("~1", "/").replace("~0", "~")
            target = cast(Mapping[str, Any], target).get(key) if _is_object(target) else None
        if not _is_object(target):
            return schema
        schema = cast(Mapping[str, Json], target)
    return schema


def _read_as(name: str, text: str) -> Any:
    if name == "null":
        return None if text in ("null", "None") else _NONE
    if name == "boolean":
        return {"true": True, "false": False}.get(text.lower(), _NONE)
    if name == "integer":
        return _integer(text)
    if name == "number":
        return _number(text)
    value = _load_json(text)
    if value is _NONE:
        value = _load_python(text)
    fits = isinstance(value, list) if name == "array" else isinstance(value, dict)
    return value if fits else _NONE


def _integer(text: str) -> Any:
    try:
        return int(text.partition(".")[0]) if _INTEGER.match(text) else _NONE
    except ValueError:  # more digits than Python converts
        return _NONE


def _number(text: str) -> Any:
    whole = _integer(text) if "." not in text else _NONE
    if whole is not _NONE:
        return whole
    try:
        value = float(text)
    except ValueError:
        return _NONE
    return value if math.isfinite(value) and text.isascii() and "_" not in text else _NONE


def _load_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NONE


def _load_python(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's odd escapes are nobody's news
            value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return _NONE
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)
