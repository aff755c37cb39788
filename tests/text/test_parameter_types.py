"""Values of parameters: read by their schema, and written so that they are read back."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemotron3.errors import DataError
from nemotron3.text.parameter_types import ANYTHING, parameter_type, readable_type
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
        ("Paris", ["string", "null"], "Paris"),
        ('"Paris"', ["string", "null"], '"Paris"'),
        ('"null"', ["string", "null"], "null"),
        ('"3"', ["string", "null"], '"3"'),
        ('"3"', ["string", "integer"], "3"),
        ("3", ["string", "integer"], 3),
        ("3.5", ["string", "integer"], "3.5"),
        (" 3", ["string", "integer"], " 3"),
        ("3\n", ["string", "integer"], "3\n"),
        ("", ["string", "null"], ""),
        ("[a] b", ["string", "array"], "[a] b"),
        ('["a"]', ["string", "array"], ["a"]),
        ('"[1]"', ["string", "array"], "[1]"),
        ("auto", {"enum": ["auto", 3, None]}, "auto"),
        ("4", {"enum": ["auto", 3, None]}, "4"),
        ("3", {"enum": ["3", 3]}, 3),
        ('"3"', {"enum": ["3", 3]}, "3"),
        ("1", {"enum": [True, "x"]}, "1"),
        ("[1, 2]", {"const": [1, 2]}, [1, 2]),
        ("x", {"type": "string", "nullable": True}, "x"),
        ("null", {"type": "string", "nullable": True}, None),
        ("5", {"properties": {"a": {}}}, "5"),
        ("5", {"minimum": 3}, 5),
        ("5", True, 5),
        ("5", False, 5),
    ],
)
def test_value_by_schema(text, schema, value):
    schema = {"type": schema} if isinstance(schema, list) else schema
    read = readable_type(schema, ROOT).read(text)
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
    assert parameter_type(schema).is_plain_text is plain


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
    held = parameter_type(schema)
    assert held.read(write_argument(value)) == value
    assert held.read(json.dumps(value)) == value


def written(held, value):
    """As a call has to say it so that nothing else is understood."""
    is_quoted = isinstance(value, str) and held.looks_other(value)
    return json.dumps(value, ensure_ascii=False) if is_quoted else write_argument(value)


MIXED = st.sets(st.sampled_from(sorted({*NAMES.values(), "string"})), min_size=1).map(
    lambda names: {"type": sorted({*names, "string"})}
)
AWKWARD = st.recursive(
    st.sampled_from(["null", "None", "TRUE", "3", "-1.50", "1e5", ".5", "[", "{}", "[1]", "", "a"])
    | st.text(alphabet='"\\ \n3n[]é', max_size=6),
    lambda texts: texts.map(lambda text: json.dumps(text, ensure_ascii=False)),
    max_leaves=3,
)


@given(schema=MIXED, text=AWKWARD)
@example(schema={}, text='"3"')
def test_a_text_beside_other_types_is_never_taken_for_one_of_them(schema, text):
    held = parameter_type(schema)
    assert held.read(written(held, text)) == text
    assert json.loads(held.read_json(written(held, text))) == text


@given(value=JSON)
def test_what_is_no_text_is_read_as_what_it_is_beside_texts(value):
    assert ANYTHING.read(write_argument(value)) == value
    assert json.loads(ANYTHING.read_json(write_argument(value))) == value


def test_json_stays_as_it_was_written():
    held = parameter_type({"type": "array"})
    assert held.read_json("[1e400,  0.10]") == "[1e400,  0.10]"
    assert held.read_json("[None, 1]") == "[null, 1]"


@pytest.mark.parametrize(
    "text",
    ["[" * 300 + "]" * 300, "[" + "-" * 300_000 + "1]", "[" + "1+" * 300_000 + "1]", "[NaN]"],
    ids=["deep", "signs", "sums", "no number"],
)
def test_what_python_cannot_hold_stays_text(text):
    assert parameter_type({"type": "array"}).read(text) == text


def tangle(count):
    names = [f"d{i}" for i in range(count)]
    return {name: {"anyOf": [{"$ref": f"#/$defs/{other}"} for other in names]} for name in names}


@pytest.mark.parametrize(
    "root",
    [
        {"$defs": tangle(12)},
        {"$defs": {"d0": {"allOf": [{"anyOf": [{"type": "string"}] * 20}] * 6}}},
        {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(2000)}},
        {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}},
    ],
    ids=["tangle", "product", "chain", "doubling"],
)
def test_a_schema_that_cannot_be_followed_is_said_and_read_as_none(root):
    with pytest.raises(DataError, match="write it flatter"):
        parameter_type({"$ref": "#/$defs/d0"}, root)
    assert readable_type({"$ref": "#/$defs/d0"}, root) is ANYTHING


def test_long_lists_of_choices_are_read_at_once():
    held = parameter_type({"enum": [f"word {i}" for i in range(20_000)]})
    assert len(held.literals) == 20_000
    assert held.is_plain_text
