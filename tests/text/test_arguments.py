"""Arguments of calls read by their schema."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.text.arguments import is_plain_text, read_argument
from nemotron3.text.tool_listing import write_argument

OPTIONAL = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
ROOT = {
    "$defs": {
        "n/a": {"type": "number"},
        "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "boolean"}]},
        "self": {"$ref": "#/$defs/self"},
    }
}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        (" a\n", {"type": "string"}, " a\n"),
        ("5", {"type": "integer"}, 5),
        (" -3 ", {"type": "integer"}, -3),
        ("3.0", {"type": "integer"}, 3),
        ("3.5", {"type": "integer"}, "3.5"),
        ("five", {"type": "integer"}, "five"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("1_0", {"type": "number"}, "1_0"),
        ("٣", {"type": "number"}, "٣"),
        ("5", {"type": "number"}, 5),
        ("1e-3", {"type": "number"}, 0.001),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ("null", {"type": "null"}, None),
        ("None", {"type": ["string", "null"]}, None),
        ("none", {"type": ["string", "null"]}, "none"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("[1, 2]", {"type": "object"}, "[1, 2]"),
        ('{"a": true}', {"type": "object"}, {"a": True}),
        ("{'a': True}", {"type": "object"}, {"a": True}),
        ("{1, 2}", {"type": "object"}, "{1, 2}"),
        (r"{'a': '\d'}", {"type": "object"}, {"a": r"\d"}),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("4", OPTIONAL, 4),
        ("None", OPTIONAL, None),
        ("four", OPTIONAL, "four"),
        ("4", {"type": "integer", "nullable": True}, 4),
        ("null", {"type": "integer", "nullable": True}, None),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("true", {"enum": [True]}, True),
        ("c", {"enum": ["a"], "type": "string"}, "c"),
        ("x", {"const": "x"}, "x"),
        ("7", {"allOf": [{"type": "integer"}, {"minimum": 3}]}, 7),
        ("7", {"description": "anything"}, 7),
        ("seven", {"description": "anything"}, "seven"),
        ("7", None, 7),
        ('"7"', None, "7"),
        ("{oops", None, "{oops"),
        ("Infinity", None, "Infinity"),
        ("0.5", {"$ref": "#/$defs/n~1a"}, 0.5),
        ("true", {"$ref": "#/$defs/loop"}, True),
        ("true", {"$ref": "#/$defs/self"}, True),
        ("true", {"$ref": "#/$defs/gone"}, True),
    ],
)
def test_value_by_schema(text, schema, value):
    read = read_argument(text, schema, root=ROOT)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        ({"type": "string"}, True),
        ({"type": "string", "enum": ["1", "2"]}, True),
        ({"anyOf": [{"type": "string"}]}, True),
        ({"type": ["string", "null"]}, False),
        ({"type": "string", "enum": [1]}, False),
        ({}, False),
        (None, False),
    ],
)
def test_only_strings_are_passed_on_as_they_come(schema, plain):
    assert is_plain_text(schema) is plain


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=6,
)
NAMES = {"NoneType": "null", "bool": "boolean", "int": "integer", "float": "number"}
NAMES |= {"list": "array", "dict": "object"}


@given(value=JSON)
def test_what_the_template_writes_is_read_back(value):
    schema = {"type": NAMES[type(value).__name__]}
    read = read_argument(write_argument(value), schema)
    assert read == value
    assert read_argument(json.dumps(value), schema) == value
