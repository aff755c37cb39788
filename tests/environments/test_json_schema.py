"""The checker of schemas, beside what its keywords mean."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.environments.json_schema import schema_error
from nemotron3.errors import ConfigError

FITS = [
    (3, {"type": "integer", "minimum": 3, "maximum": 3}),
    (2.5, {"type": "number"}),
    (10**400, {"type": "number", "minimum": 0.5}),
    (None, {"type": ["null", "string"]}),
    ("ab", {"type": "string", "minLength": 2, "maxLength": 2}),
    ([1, 2], {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}),
    ({"a": 1}, {"type": "object", "properties": {"a": {}}, "required": ["a"]}),
    ({"a": 1}, {"type": "object"}),
    ({"b": 1}, {"properties": {"a": {}}, "additionalProperties": True}),
    ({"a": [1]}, {"const": {"a": [1]}}),
    ("x", {"enum": ["x", 1], "description": "any"}),
]
DOES_NOT = [
    (True, {"type": "integer"}, "is not integer"),
    (1, {"type": "boolean"}, "is not boolean"),
    (1.0, {"type": "integer"}, "is not integer"),
    (float("nan"), {"type": "number"}, "is not number"),
    (-(10**400), {"type": "number", "minimum": 0.5}, "against minimum"),
    (2, {"type": "integer", "minimum": 3}, "against minimum 3"),
    (4, {"maximum": 3}, "against maximum 3"),
    ("abc", {"maxLength": 2}, "against maxLength 2"),
    ([], {"minItems": 1}, "against minItems 1"),
    ([1, "2"], {"items": {"type": "integer"}}, r"value\[1\] is not integer"),
    ({}, {"required": ["a"]}, "has no a"),
    ({"b": 1}, {"properties": {"a": {}}}, "has b, which is not asked for"),
    ({"b": 1}, {"additionalProperties": False}, "has b, which is not asked for"),
    ({"a": {"b": "1"}}, {"properties": {"a": {"properties": {"b": {"type": "integer"}}}}}, "b is"),
    (1, {"const": True}, "is not True"),
    (1, {"const": 1.0}, "is not 1.0"),
    ([True], {"enum": [[1]]}, "is not one of"),
]


@pytest.mark.parametrize(("value", "schema"), FITS)
def test_what_fits(value, schema):
    assert schema_error(value, schema) is None


@pytest.mark.parametrize(("value", "schema", "said"), DOES_NOT)
def test_what_does_not(value, schema, said):
    error = schema_error(value, schema)
    assert error is not None
    assert re.search(said, error)


def test_an_unknown_keyword_is_an_error_of_the_schema():
    with pytest.raises(ConfigError, match="'patternProperties', which is not supported"):
        schema_error({}, {"patternProperties": {}})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)


@given(values)
def test_every_value_is_its_own_constant(value):
    assert schema_error(value, {"const": value}) is None
    assert schema_error([value], {"const": [value, value]}) is not None
