"""JSON, YAML, XML, TOML and CSV: text to a value of a schema, and back.

Readers are strict: the whole text is one document, a key that stands twice is refused (most
parsers silently take the last one, so that an answer could state two values), and so are documents
that grow when they are read (aliases, entities). XML and CSV know texts alone; the schema says
which of them are numbers. Without PyYAML the reader of YAML raises `DependencyMissingError`.
"""

import csv
import io
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, cast
from xml.etree import ElementTree

from nemotron3.errors import DependencyMissingError

Schema = Mapping[str, Any]
ROOT = "record"
"""The root element of XML, and the unit of a table."""

_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,18}(\.\d{1,18})?", re.ASCII)
_MAX_FLOW = 200
_PARSER_ERRORS = (
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)
"""What parsers raise besides errors of their own where a text is none of theirs; PyYAML raises all
of these. `MemoryError` and `OSError` say nothing of the text."""


class FormatError(ValueError):
    """A text that is no document of its format; the message says where."""


def read_json(text: str, schema: Schema) -> Any:
    """One JSON document, without NaN and without a key twice."""
    del schema

    def refuse(constant: str) -> Any:
        raise FormatError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=refuse)
    except _PARSER_ERRORS as error:
        raise FormatError(f"no JSON: {error}") from error


def read_toml(text: str, schema: Schema) -> Any:
    """One TOML document."""
    del schema
    try:
        return tomllib.loads(text)
    except _PARSER_ERRORS as error:
        raise FormatError(f"no TOML: {error}") from error


def read_yaml(text: str, schema: Schema) -> Any:
    """One YAML document without aliases and tags."""
    del schema
    yaml = _yaml()
    if text.count("[") + text.count("{") > _MAX_FLOW:  # the parser takes seconds for thousands
        raise FormatError(f"YAML with more than {_MAX_FLOW} brackets")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise FormatError("it is empty")
        if "&" in text or "!" in text:
            _refuse_anchors_and_tags(yaml, text)
        return _yaml_value(yaml, node)
    except (yaml.YAMLError, *_PARSER_ERRORS) as error:
        raise FormatError(f"no YAML: {error}") from error


def read_xml(text: str, schema: Schema) -> Any:
    """One XML document: elements with texts, no attributes, no entities of its own."""
    if "<!" in text or "<?" in text:
        raise FormatError("XML with a declaration; elements alone are wanted")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, *_PARSER_ERRORS) as error:
        raise FormatError(f"no XML: {error}") from error
    if root.tag != ROOT:
        raise FormatError(f"the root is <{root.tag[:40]}>, not <{ROOT}>")
    return _of_element(root, schema, depth=0)


def read_csv(text: str, schema: Schema) -> Any:
    """A header and rows; each row is an object of the schema's items."""
    try:
        table = list(csv.reader(io.StringIO(text.strip()), strict=True))
    except (csv.Error, *_PARSER_ERRORS) as error:
        raise FormatError(f"no CSV: {error}") from error
    if not table or any(len(row) != len(table[0]) for row in table):
        raise FormatError("no CSV: rows of different lengths")
    properties = schema.get("items", {}).get("properties", {})
    return [
        _pairs(
            [(k, _of_text(v, properties.get(k, {}))) for k, v in zip(table[0], row, strict=True)]
        )
        for row in table[1:]
    ]


def write_json(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def write_yaml(value: Any, indent: str = "") -> str:
    """YAML of objects, lists and scalars; texts must be plain words."""
    lines: list[str] = []
    for key, part in value.items():
        if isinstance(part, Mapping):
            lines += [f"{indent}{key}:", write_yaml(part, indent + "  ")]
        elif isinstance(part, list):
            listed = ", ".join(map(_plain, cast(list[Any], part)))
            lines.append(f"{indent}{key}: [{listed}]")
        else:
            lines.append(f"{indent}{key}: {_plain(part)}")
    return "\n".join(lines)


def write_toml(value: Any) -> str:
    """TOML with inline tables."""
    return "\n".join(f"{key} = {_toml_value(part)}" for key, part in value.items())


def write_xml(value: Any) -> str:
    """XML without white space; a list is a run of `item` elements."""
    return f"<{ROOT}>{_xml_inside(value)}</{ROOT}>"


def write_csv(value: Any) -> str:
    """A header and one line for each object."""
    rows = cast(list[dict[str, Any]], value)
    return "\n".join([",".join(rows[0]), *(",".join(map(_plain, row.values())) for row in rows)])


READERS: Mapping[str, Callable[[str, Schema], Any]] = MappingProxyType(
    {
        "json": read_json,
        "yaml": read_yaml,
        "xml": read_xml,
        "toml": read_toml,
        "csv": read_csv,
    }
)
WRITERS: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {
        "json": write_json,
        "yaml": write_yaml,
        "xml": write_xml,
        "toml": write_toml,
        "csv": write_csv,
    }
)


def is_available(kind: str) -> bool:
    """Whether a format can be read here: YAML needs PyYAML."""
    try:
        return kind != "yaml" or bool(_yaml())
    except DependencyMissingError:
        return False


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("a key stands twice")
    return found


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = cast(Mapping[str, Any], value).items()
        return "{" + ", ".join(f"{key} = {_toml_value(part)}" for key, part in parts) + "}"
    return json.dumps(value)


def _xml_inside(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = cast(Mapping[str, Any], value).items()
        return "".join(f"<{key}>{_xml_inside(part)}</{key}>" for key, part in parts)
    if isinstance(value, list):
        return "".join(f"<item>{_plain(part)}</item>" for part in cast(list[Any], value))
    return _plain(value)


def _of_text(text: str, schema: Schema) -> Any:
    """The value of a text by the type of its schema; the text itself where it is none of it."""
    said = text.strip()
    match schema.get("type"):
        case "integer" if _INTEGER.fullmatch(said):
            return int(said)
        case "number" if _NUMBER.fullmatch(said):
            return float(said)
        case "boolean" if said in ("true", "false"):
            return said == "true"
        case _:
            return text


def _of_element(element: ElementTree.Element, schema: Schema, depth: int) -> Any:
    if element.attrib:
        raise FormatError(f"<{element.tag[:40]}> has attributes")
    if depth > 20:
        raise FormatError("elements are nested too deep")
    kind = schema.get("type")
    children = list(element)
    if kind not in ("object", "array"):
        if children:
            raise FormatError(f"<{element.tag[:40]}> has elements inside, a text is wanted")
        return _of_text(element.text or "", schema)
    if (element.text or "").strip() or any((child.tail or "").strip() for child in children):
        raise FormatError(f"<{element.tag[:40]}> has text between its elements")
    if kind == "array":
        if any(child.tag != "item" for child in children):
            raise FormatError(f"<{element.tag[:40]}> has elements other than <item>")
        return [_of_element(child, schema.get("items", {}), depth + 1) for child in children]
    parts = schema.get("properties", {})
    return _pairs([(c.tag, _of_element(c, parts.get(c.tag, {}), depth + 1)) for c in children])


def _yaml_value(yaml: Any, node: Any) -> Any:
    """The value of a node, with each key once; scalars as PyYAML's safe loader reads them."""
    if isinstance(node, yaml.MappingNode):
        keys = [_yaml_value(yaml, key) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys):
            raise FormatError("a key is no text")
        values = [_yaml_value(yaml, value) for _, value in node.value]
        return _pairs(list(zip(keys, values, strict=True)))
    if isinstance(node, yaml.SequenceNode):
        return [_yaml_value(yaml, value) for value in node.value]
    return yaml.SafeLoader("").construct_object(node)


def _refuse_anchors_and_tags(yaml: Any, text: str) -> None:
    """A tag has a scalar read as another type than its text is of, or by any constructor."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        for name in ("anchor", "tag"):
            if (found := getattr(event, name, None)) is not None:
                raise FormatError(f"the {name} {found[:40]!r} is no plain YAML")


def _yaml() -> Any:
    try:
        return import_module("yaml")
    except ImportError as error:
        raise DependencyMissingError(
            "reading YAML needs PyYAML: pip install 'nemotron3[environments]', or leave yaml out "
            "of the formats"
        ) from error
