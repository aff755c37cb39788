"""Arguments of a forced call fit the schema, whatever a model wrote within the grammar.

Schemas are those that pydantic and zod write. The model is chance: any token that the grammar lets
through may come.
"""

import json
import random

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron3.errors import DataError
from nemotron3.inference.structured_output.grammar_compiler import GrammarCompiler
from nemotron3.server.generation.tool_choice import tool_use
from nemotron3.text import ResponseParser, Tokenizer, parse_tools

TEXT = (
    '<function=f>\n<parameter=a>\nnull\n</parameter>\n<parameter=b>\n</function> "true" "12" '
    '{"a": "b", "k": 1}, [1, 2.5] True None 2024-02-29T10:00:00Z a@b.io red'
)
CLOSE = "\n</parameter>\n</function>\n"
NAMES = ["a", "b", "c", "a b", 'q"t', "é", "a.b", "x-y", "$ref", "properties"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 9, vocab_size=380, num_special_tokens=32)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size)


STRINGS = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "minLength": 1},
        {"type": "string", "minLength": 2, "maxLength": 5, "title": "Short"},
        {"type": "string", "maxLength": 3000},
        {"type": "string", "pattern": "^[a-z]{2,4}$"},
        {"type": "string", "pattern": r"^\d{4}-\d{2}$|^x[\w/]*$"},
        {"type": "string", "pattern": "b"},
        {"type": "string", "format": "date-time"},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "uuid", "default": "x"},
        {"type": "string", "format": "email", "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)"
         r"[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"},
        {"type": "string", "format": "password"},
    ]
)  # fmt: skip
NUMBERS = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "number", "description": "how much", "default": 0.5},
        {"type": "integer", "minimum": 1, "maximum": 20},
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
    ]
)
WORDS = st.sampled_from(
    ["red", "Rome", "null", "true", "3", '"3"', "", " ", "a\nb", "[x]", "{}", "None", '"null"',
     "</parameter>", "x\n<parameter=a>\ny", "3.0", "é", "new york"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1e-05, 2.0])
CHOICES = st.one_of(
    st.lists(WORDS, min_size=1, max_size=4, unique=True).map(
        lambda words: {"type": "string", "enum": words}
    ),
    st.lists(WORDS | SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    (WORDS | SCALARS).map(lambda value: {"const": value}),
    WORDS.map(lambda word: {"type": "string", "const": word, "default": word}),
)
DEFINITIONS = {
    "Color": {"enum": ["red", "null", "3"], "title": "Color", "type": "string"},
    "Node": {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None},
        },
        "required": ["value"],
        "additionalProperties": False,
    },
    "Alias": {"$ref": "#/$defs/Color"},
    "Text": {"type": "string"},
}
REFERENCES = st.sampled_from(
    [
        {"$ref": "#/$defs/Color"},
        {"allOf": [{"$ref": "#/$defs/Color"}], "default": "red", "description": "which"},
        {"$ref": "#/$defs/Node"},
        {"$ref": "#/$defs/Alias", "title": "Other"},
        {"$ref": "#/$defs/Text"},
        {"allOf": [{"$ref": "#/$defs/Text"}, {"maxLength": 4}]},
    ]
)


def object_of(properties, required, *, extra):
    schema = {"type": "object", "properties": properties}
    schema["required"] = [name for name, must in zip(properties, required, strict=False) if must]
    if extra is not None:
        schema["additionalProperties"] = extra
    return schema


def combined(inner):
    return st.one_of(
        inner.map(lambda s: {"anyOf": [s, {"type": "null"}], "default": None}),
        st.lists(inner, min_size=1, max_size=3).map(lambda s: {"anyOf": s}),
        st.lists(inner, min_size=1, max_size=1).map(lambda s: {"allOf": s}),
        inner.map(lambda s: {"type": "array", "items": s, "maxItems": 2}),
        inner.map(lambda s: {"type": "object", "additionalProperties": s, "maxProperties": 2}),
        st.builds(
            object_of,
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
            st.lists(st.booleans(), min_size=2, max_size=2),
            extra=st.sampled_from([None, False]),
        ),
    )


SCHEMAS = st.recursive(
    st.one_of(
        STRINGS,
        NUMBERS,
        CHOICES,
        REFERENCES,
        st.sampled_from(
            [
                {"type": "boolean"},
                {"type": ["string", "null"]},
                {"type": ["string", "integer", "null"]},
                {"type": ["array", "string"], "items": {"type": "string"}, "maxItems": 2},
                {"type": "null"},
                {},
                True,
                {"description": "anything"},
            ]
        ),
    ),
    combined,
    max_leaves=4,
)
PARAMETERS = st.builds(
    object_of,
    st.dictionaries(st.sampled_from(NAMES), SCHEMAS, min_size=1, max_size=3),
    st.lists(st.sampled_from([True, True, False]), min_size=3, max_size=3),
    extra=st.sampled_from([None, False]),
).map(lambda schema: {**schema, "$defs": DEFINITIONS})


def forced(compiler, tokenizer, parameters, seed):
    """The text of a call that chance writes within the grammar."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    use = tool_use([tool], "required", is_parallel=False)
    stop_ids = frozenset(tokenizer.stop_ids)
    constraint = compiler.constraint(use.structured, stop_ids=stop_ids, is_reasoning_open=False)
    chance = random.Random(seed)
    ids, close = [], tokenizer.encode(CLOSE)
    for step in range(3000):
        allowed = constraint.mask().nonzero().flatten().tolist()
        # Text and JSON may continue without end, so the tokens that end them are made likely.
        ending = [t for t in allowed if tokenizer.token_bytes(t)[:1] in b'"]}' or t in stop_ids]
        if step > 20 and ending and chance.random() < 0.5:
            tokens = [chance.choice(ending)]
        elif step > 20 and chance.random() < 0.5:
            tokens = close
        else:
            tokens = [chance.choice(allowed)]
        for token in tokens:
            if not constraint.mask()[token]:
                break
            constraint.accept(token)
            ids.append(token)
            if token in stop_ids:
                return [tool], ids
    pytest.fail(f"no end: {tokenizer.decode(ids)!r}")


def read(tokenizer, tools, ids):
    parser = ResponseParser(tokenizer, is_reasoning_open=False, tools=parse_tools(tools))
    parser.push(ids)
    parser.finish()
    return parser.response()


@pytest.mark.slow
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(parameters=PARAMETERS, seed=st.integers(0, 2**32))
def test_forced_arguments_fit_their_schema(compiler, tokenizer, parameters, seed):
    try:
        tools, ids = forced(compiler, tokenizer, parameters, seed)
    except DataError as error:  # a constant that no call can hold
        if "can be written in a call" not in str(error):
            raise
        return
    response = read(tokenizer, tools, ids)
    (call,) = response.tool_calls
    shown = (tokenizer.decode(ids), call.arguments)
    assert call.is_complete, shown
    arguments = json.loads(call.arguments)
    assert response.content == "", shown
    validator = jsonschema.Draft202012Validator(
        parameters, format_checker=jsonschema.FormatChecker()
    )
    problem = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    assert problem is None, (shown, problem and problem.message)
