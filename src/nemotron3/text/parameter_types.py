r"""How the value of a parameter is written in a call, and how it is read.

A call contains only text; its meaning follows from the tool's JSON schema. The parser of calls and
the grammar of calls both use the `ParameterType` of this module. The published template writes a
text literally, lists and objects as JSON, everything else as Python's `str` (`True`, `None`,
`0.5`); JSON's `true` and `null` mean the same.

- **Text alone** (`{"type": "string"}`): the whole text is the value, quotes included.
- **No text** (`Optional[int]`, lists, objects): the value has the most specific type that fits, in
  the order null, boolean, integer, number, array, object; white space around it is ignored.
- **Text or another type** (`Optional[str]`, `str | int`, no type at all): `null` is null, `3` is
  the number, everything else is the literal text (` 3`, `"Paris"` with its quotes). A text that
  would be read as another type is written as a JSON string: `"null"`, `"3"`. A JSON string whose
  content needs no quotes is a text that includes the quotes.
- **A value that fits no type** remains text: the caller should see a wrong argument rather than
  lose it. Further validation is left to the tool.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from nemotron3.errors import DataError
from nemotron3.text.arguments import UNREAD, load_json, read_as
from nemotron3.text.messages import Json
from nemotron3.text.schemas import Conjunction, alternatives
from nemotron3.text.string_regex import fits_string

KINDS = ("null", "boolean", "integer", "number", "array", "object", "string")
"""JSON's types, the most specific first; every integer is also a number."""

LOOKS: Mapping[str, str] = {
    "null": "null|None",
    "boolean": "[Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]",
    "integer": r"[-+]?[0-9]+(?:\.0+)?",
    "number": r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?",
    "array": r"\[(?s:.*)",
    "object": r"\{(?s:.*)",
}
"""For each type, a pattern of the texts that may be read as it, for `re` and Rust's `regex`."""

_IMPLIED = (
    ("object", frozenset({"properties", "additionalProperties", "required", "patternProperties"})),
    ("array", frozenset({"items", "prefixItems", "minItems", "maxItems"})),
    ("string", frozenset({"minLength", "maxLength", "pattern", "format"})),
    (
        "number",
        frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ParameterType:
    """The allowed values of a parameter; all fields are empty if no value fits."""

    literals: tuple[Json, ...] = ()
    """Values that are listed one by one (`enum`, `const`)."""
    texts: tuple[Conjunction, ...] = ()
    """Plain schemas for strings; a string must fit one of them."""
    others: tuple[tuple[frozenset[str], Conjunction], ...] = ()
    """Other types, each set with the plain schema that their values must fit."""

    @property
    def is_never(self) -> bool:
        """Whether no value fits."""
        return not (self.literals or self.texts or self.others)

    @cached_property
    def has_text(self) -> bool:
        """Whether a string may be a value."""
        return bool(self.texts) or any(isinstance(value, str) for value in self.literals)

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The types other than string."""
        found = {kind for kinds, _ in self.others for kind in kinds}
        found |= {kind_of(value) for value in self.literals if not isinstance(value, str)}
        return frozenset(found)

    @cached_property
    def _literal_keys(self) -> frozenset[str]:
        return frozenset(map(_key, self.literals))

    @property
    def is_plain_text(self) -> bool:
        """Whether every text is its own value, so that parts of it can be streamed."""
        return self.has_text and not self.kinds

    def looks_other(self, text: str) -> bool:
        """Whether a string must be written as a JSON string to be read back as a string."""
        while True:
            if any(re.fullmatch(LOOKS[kind], text) for kind in self.kinds):
                return True
            content = _quoted_content(text)
            if content is None:
                return False
            text = content

    def read(self, text: str) -> Json:
        """The value of a text."""
        return self._read(text)[0]

    def read_json(self, text: str) -> str:
        """The value as JSON; a text that is already JSON is returned unchanged."""
        value, written = self._read(text)
        return json.dumps(value, ensure_ascii=False) if written is None else written

    def _read(self, text: str) -> tuple[Json, str | None]:
        if self.is_never:
            return ANYTHING._read(text)
        if self.is_plain_text:
            return text, None
        exact = text if self.has_text else text.strip()
        if exact == exact.strip():
            for kind in KINDS[:-1]:
                value, written = self._read_kind(kind, exact)
                if value is not UNREAD:
                    return value, written
        content = _quoted_content(text) if self.has_text else None
        return (text if content is None or not self.looks_other(content) else content), None

    def _read_kind(self, kind: str, text: str) -> tuple[Any, str | None]:
        if kind not in self.kinds:
            return UNREAD, None
        value, written = read_as(kind, text)
        is_free = any(kind in kinds for kinds, _ in self.others)
        is_right = value is not UNREAD and (is_free or _key(value) in self._literal_keys)
        return (value, written) if is_right else (UNREAD, None)


def parameter_type(schema: Json, root: Mapping[str, Json] | None = None) -> ParameterType:
    """The type that a parameter's schema allows; `$ref` refers to `root`, the tool's `parameters`.

    Raises `DataError` if the schema is too complex.
    """
    literals: dict[str, Json] = {}
    texts: list[Conjunction] = []
    others: list[tuple[frozenset[str], Conjunction]] = []
    for conjunction in alternatives(schema, root):
        kinds = _kinds(conjunction)
        choices = _choices(conjunction)
        if choices is not None:
            literals |= {
                key: choice
                for key, choice in choices.items()
                if kind_of(choice) in kinds and _fits_strings(choice, conjunction)
            }
            continue
        if "string" in kinds and conjunction not in texts:
            texts.append(conjunction)
        if kinds - {"string"} and (kinds - {"string"}, conjunction) not in others:
            others.append((kinds - {"string"}, conjunction))
    return ParameterType(
        literals=tuple(literals.values()), texts=tuple(texts), others=tuple(others)
    )


def readable_type(schema: Json, root: Mapping[str, Json] | None = None) -> ParameterType:
    """As `parameter_type`, but `ANYTHING` for a schema that is too complex."""
    try:
        return parameter_type(schema, root)
    except DataError:
        return ANYTHING


def kind_of(value: Json) -> str:
    """The most specific JSON type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case _:
            return "object" if isinstance(value, Mapping) else "array"


def same(one: Json, other: Json) -> bool:
    """Whether two values are equal in JSON's sense: true differs from 1, but 1.0 equals it."""
    return _key(one) == _key(other)


def _kinds(conjunction: Conjunction) -> frozenset[str]:
    found = frozenset(KINDS)
    is_said = False
    for schema in conjunction:
        named = schema.get("type")
        is_said = is_said or named is not None or "enum" in schema or "const" in schema
        if isinstance(named, str):
            found &= _widened({named})
        elif isinstance(named, Sequence):
            names = cast(Sequence[Any], named)
            found &= _widened({name for name in names if isinstance(name, str)})
    if is_said:
        return found
    keys = {key for schema in conjunction for key in schema}
    implied = {kind for kind, words in _IMPLIED if words & keys}
    return _widened(implied) if len(implied) == 1 else found


def _widened(kinds: set[str]) -> frozenset[str]:
    return frozenset(kinds | ({"integer"} if "number" in kinds else set()))


def _choices(conjunction: Conjunction) -> dict[str, Json] | None:
    """The values that all lists (`enum`, `const`) contain; None without a list."""
    found: dict[str, Json] | None = None
    for schema in conjunction:
        lists: list[list[Json]] = []
        if isinstance(schema.get("enum"), list):
            lists.append(cast(list[Json], schema["enum"]))
        if "const" in schema:
            lists.append([schema["const"]])
        for listed in lists:
            keyed = {_key(choice): choice for choice in listed}
            found = keyed if found is None else {k: v for k, v in found.items() if k in keyed}
    return found


def _fits_strings(choice: Json, conjunction: Conjunction) -> bool:
    return not isinstance(choice, str) or all(fits_string(choice, part) for part in conjunction)


def _key(value: Json) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, sort_keys=True)


def _quoted_content(text: str) -> str | None:
    """The content of a JSON string that is written as this package writes it, else None."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return None
    content, _ = load_json(text)
    is_content = isinstance(content, str) and json.dumps(content, ensure_ascii=False) == text
    return content if is_content else None


ANYTHING = parameter_type({})
"""The type of a parameter without a schema."""
