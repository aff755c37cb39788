"""The grammar of calls accepts the calls that the template writes, and nothing else."""

import json

import pytest

from nemotron3.errors import DataError
from nemotron3.inference.structured_output.grammar_compiler import GrammarCompiler
from nemotron3.server.generation.tool_choice import tool_use
from nemotron3.server.http.errors import APIError
from nemotron3.text import ResponseParser, Tokenizer, ToolCall, parse_tools
from nemotron3.text.tool_listing import write_call

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "place": {"$ref": "#/$defs/place"},
            },
            "required": ["city", "unit"],
            "$defs": {
                "place": {
                    "type": "object",
                    "properties": {"at": {"type": "array", "items": {"type": "number"}}},
                    "required": ["at"],
                    "additionalProperties": False,
                }
            },
        },
    },
}
ANYTHING = {"name": "anything"}
NOTHING = {"name": "nothing", "parameters": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, ANYTHING, NOTHING]

CALLS = [
    ToolCall(name="get_weather", arguments={"city": "Paris", "unit": "C"}),
    ToolCall(name="get_weather", arguments={"city": "a\n<b>\n", "days": 3, "unit": "F"}),
    ToolCall(name="get_weather", arguments={"city": "", "unit": "C", "place": {"at": [1.5, -2.0]}}),
    ToolCall(name="anything", arguments={"x": "1", "a long name": "two\nlines"}),
    ToolCall(name="nothing"),
]
WRONG = {
    "no call": "Hello",
    "an unknown function": "<tool_call>\n<function=other>\n</function>\n</tool_call>",
    "a required argument missing": write_call(
        ToolCall(name="get_weather", arguments={"city": "Paris"})
    ).join(["<tool_call>", "</tool_call>"]),
    "a value outside of the choices": write_call(
        ToolCall(name="get_weather", arguments={"city": "Paris", "unit": "K"})
    ).join(["<tool_call>", "</tool_call>"]),
    "a word for a number": write_call(
        ToolCall(name="get_weather", arguments={"city": "P", "days": "three", "unit": "C"})
    ).join(["<tool_call>", "</tool_call>"]),
    "words after the call": f"<tool_call>{write_call(CALLS[0])}</tool_call> Done.",
}


@pytest.fixture(scope="module")
def tokenizer():
    text = ["get_weather in Paris <function=x> <parameter=y> </parameter> </function> "] * 9
    return Tokenizer.train(text, vocab_size=330, num_special_tokens=32)


def accepts(tokenizer, use, text):
    """Whether the grammar accepts every token of the text, and an end token after it."""
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size)
    stop_ids = frozenset(tokenizer.stop_ids)
    constraint = compiler.constraint(use.structured, stop_ids=stop_ids, is_reasoning_open=False)
    for token in [*tokenizer.encode(text), tokenizer.im_end_id]:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name}-{len(call.arguments)}")
def test_calls_as_the_template_writes_them_are_taken_and_read_back(tokenizer, call):
    text = f"<tool_call>{write_call(call)}</tool_call>"
    assert accepts(tokenizer, tool_use(TOOLS, "required"), text)
    assert accepts(tokenizer, tool_use(TOOLS, None, named=call.name), text)
    parser = ResponseParser(tokenizer, is_reasoning_open=False, tools=parse_tools(TOOLS))
    parser.push(tokenizer.encode(text))
    parser.finish()
    (read,) = parser.response().tool_calls
    assert read.name == call.name
    written = {key: str(value) for key, value in call.arguments.items()}
    assert {key: str(value) for key, value in json.loads(read.arguments).items()} == written


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_right_call_is_not_taken(tokenizer, text):
    assert not accepts(tokenizer, tool_use(TOOLS, "required"), text)


def test_a_named_function_is_the_only_one(tokenizer):
    text = f"<tool_call>{write_call(CALLS[-1])}</tool_call>"
    assert accepts(tokenizer, tool_use(TOOLS, None, named="nothing"), text)
    assert not accepts(tokenizer, tool_use(TOOLS, None, named="anything"), text)


@pytest.mark.parametrize("is_parallel", [True, False])
def test_the_line_end_after_a_call_is_no_promise_of_another(tokenizer, is_parallel):
    text = f"<tool_call>{write_call(CALLS[0])}</tool_call>\n"
    assert accepts(tokenizer, tool_use(TOOLS, "required", is_parallel=is_parallel), text)


def test_calls_may_follow_each_other_unless_one_alone_is_wanted(tokenizer):
    text = "\n".join(f"<tool_call>{write_call(call)}</tool_call>" for call in CALLS[:2])
    assert accepts(tokenizer, tool_use(TOOLS, "required"), text)
    assert not accepts(tokenizer, tool_use(TOOLS, "required", is_parallel=False), text)


def test_a_model_that_may_not_call_is_not_told_of_tools():
    assert tool_use(TOOLS, "none").listed == ()
    assert len(tool_use(TOOLS, "auto").listed) == 3
    assert tool_use(TOOLS, "auto").structured is None
    assert tool_use(TOOLS, None, is_parallel=False).is_single


@pytest.mark.parametrize(
    ("tools", "choice", "named", "said"),
    [
        (None, "required", None, "there are no tools"),
        ([], None, "f", "there are no tools"),
        (TOOLS, None, "g", "the tools are get_weather, anything, nothing"),
        ([NOTHING, NOTHING], "auto", None, "two functions of one name"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(tools, choice, named, said):
    with pytest.raises(APIError, match=said):
        tool_use(tools, choice, named=named)


COLOR = {"$defs": {"Color": {"enum": ["red", "blue"], "type": "string"}}}
OPTIONAL_COLOR = {"anyOf": [{"$ref": "#/$defs/Color"}, {"type": "null"}]}
LOOP = {"$ref": "#/$defs/Loop"}
SAID = [
    # a parameter's schema, what is written, what it is read as
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "Paris", "Paris"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '"null"', "null"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '"a phrase"', '"a phrase"'),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "", ""),
    ({"type": ["string", "null"]}, "two\nlines\n", "two\nlines\n"),
    ({"type": "string", "nullable": True}, "null", None),
    ({"type": ["string", "integer"]}, "3", 3),
    ({"type": ["string", "integer"]}, "3 rue", "3 rue"),
    ({"type": ["string", "array"]}, "[1, 2]", [1, 2]),
    ({"anyOf": [{"type": "string", "enum": ["Rome"]}, {"type": "null"}]}, "Rome", "Rome"),
    ({"type": "string", "const": "Rome"}, "Rome", "Rome"),
    (OPTIONAL_COLOR, "red", "red"),
    ({"allOf": [{"$ref": "#/$defs/Color"}], "default": "red"}, "blue", "blue"),
    ({"$ref": "#/properties/other"}, "True", True),
    ({"type": "boolean"}, "False", False),
    ({"type": "number"}, "1e-05", 1e-05),
    ({}, "word", "word"),
    ({}, '{"a": [1]}', {"a": [1]}),
    (True, "null", None),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"a": 1}', {"a": 1}),
    ({"type": "array", "items": {"type": "string"}}, '["</parameter>\\n</function>"]',
     ["</parameter>\n</function>"]),
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
     '{"any": 1}', {"any": 1}),
    ({"type": "object", "propertyNames": {"$ref": "#/$defs/Color"},
      "additionalProperties": {"type": "integer"}}, '{"red": 1}', {"red": 1}),
    ({"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^(?!x)"}]}, "2.5", 2.5),
    ({"type": "string", "format": "date-time"}, "2024-02-29T10:00:00Z", "2024-02-29T10:00:00Z"),
]  # fmt: skip
UNSAID = [
    ({"type": "string", "const": "Rome"}, "Paris"),
    (OPTIONAL_COLOR, '"red"'),
    (OPTIONAL_COLOR, "green"),
    ({"allOf": [{"$ref": "#/$defs/Color"}]}, "green"),
    ({"$ref": "#/$defs/Color"}, "green"),
    ({"type": ["integer", "null"]}, "word"),
    ({"type": "string", "maxLength": 3}, "word"),
    ({"type": "string", "pattern": "^[a-z]+$"}, "W"),
    ({"type": "string", "format": "date"}, "2023-02-29"),
    ({"type": "string"}, "a\n<parameter=other>\nb"),
    ({"type": "object", "propertyNames": {"$ref": "#/$defs/Color"}}, '{"green": 1}'),
    ({"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^(?!x)"}]}, "word"),
    ({"type": "number", "minimum": 0}, "1e999"),
    ({"type": "string"}, "a</parameter>\n</function>"),
    ({"type": ["string", "integer"], "maxLength": 3}, '"1234"'),
]


def told(schema, written):
    properties = {"c": schema, "other": {"type": "boolean"}}
    parameters = {"type": "object", "required": ["c"], "properties": properties, **COLOR}
    tool = {"name": "f", "parameters": parameters}
    text = f"<tool_call>\n<function=f>\n<parameter=c>\n{written}\n</parameter>\n</function>\n"
    return tool, f"{text}</tool_call>"


@pytest.mark.parametrize(("schema", "written", "value"), SAID)
def test_what_may_be_written_is_what_is_read(tokenizer, schema, written, value):
    tool, text = told(schema, written)
    assert accepts(tokenizer, tool_use([tool], "required"), text)
    parser = ResponseParser(tokenizer, is_reasoning_open=False, tools=parse_tools([tool]))
    parser.push(tokenizer.encode(text))
    parser.finish()
    (read,) = parser.response().tool_calls
    assert read.is_complete
    assert json.loads(read.arguments) == {"c": value}
    assert type(json.loads(read.arguments)["c"]) is type(value)


@pytest.mark.parametrize(("schema", "written"), UNSAID)
def test_what_does_not_fit_the_schema_may_not_be_written(tokenizer, schema, written):
    tool, text = told(schema, written)
    assert not accepts(tokenizer, tool_use([tool], "required"), text)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (False, "parameter 'c' is required and no value fits"),
        ({"type": "string", "enum": [3]}, "parameter 'c' is required and no value fits"),
        ({"const": "</parameter>"}, "can be written in a call"),
        ({"$ref": "#/$defs/Gone"}, "leads nowhere|'.ref' cannot be enforced"),
        ({"type": "object", "properties": {"x": {"$ref": "#/$defs/Gone"}}}, "leads nowhere"),
        ({"type": "string", "not": {"const": "a"}}, "'not' cannot be enforced"),
        ({"type": "string", "pattern": "a(^b)"}, "'\\^' and '\\$' are supported only at the ends"),
        ({"type": "string", "pattern": "^(?!x)"}, "look-around cannot be enforced"),
        ({"type": "string", "minLength": "x"}, "give a number of characters"),
    ],
)
def test_a_schema_that_cannot_be_enforced_in_a_call_is_refused(schema, said):
    tool, _ = told(schema, "")
    with pytest.raises(DataError, match=said) as caught:
        tool_use([tool], "required")
    assert caught.value.field == "tools[0].parameters.properties.c"
    assert f"{caught.value.field}: no call of 'f' can be required; " in str(caught.value)
    assert tool_use([tool], "auto").structured is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/Args", "$defs": {"Args": {"properties": {"n": {"type": "integer"}}}}},
        {"allOf": [{"properties": {"n": {"type": "integer"}}}, {"required": ["n"]}]},
        {"anyOf": [{"properties": {"m": {}}, "required": ["m"]},
                   {"properties": {"n": {"type": "integer"}}}]},
        {"type": "object", "additionalProperties": {"type": "integer"}},
    ],
)  # fmt: skip
def test_parameters_are_found_wherever_the_schema_says_them(tokenizer, parameters):
    tool = {"name": "f", "parameters": parameters}
    text = "<tool_call>\n<function=f>\n<parameter=n>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert accepts(tokenizer, tool_use([tool], "required"), text.format(3))
    assert not accepts(tokenizer, tool_use([tool], "required"), text.format("x"))
    parser = ResponseParser(tokenizer, is_reasoning_open=False, tools=parse_tools([tool]))
    parser.push(tokenizer.encode(text.format("3.0")))
    assert parser.response().tool_calls[0].arguments == '{"n": 3}'


@pytest.mark.parametrize("name", ['say "hi"', "a\\b", "größe", "🙂", "tab\there", "a'b"])
def test_names_may_hold_what_a_grammar_has_to_escape(tokenizer, name):
    tool = {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}
    text = f"<tool_call>{write_call(ToolCall(name=name, arguments={name: 'x'}))}</tool_call>"
    assert accepts(tokenizer, tool_use([tool], "required"), text)


def test_many_parameters_of_text_share_what_keeps_them_apart(tokenizer):
    properties = {f"a_parameter_of_many_{i}": {"type": "string"} for i in range(120)}
    use = tool_use([{"name": "f", "parameters": {"properties": properties}}], "required")
    assert len(use.structured.value) < 64_000
    arguments = dict.fromkeys(properties, "x < y")
    text = write_call(ToolCall(name="f", arguments=arguments))
    assert accepts(tokenizer, use, f"<tool_call>{text}</tool_call>")


def test_a_tool_that_cannot_be_read_is_named():
    with pytest.raises(DataError, match=r"tools\[1\]\.name"):
        tool_use([NOTHING, {"name": ""}], "auto")


def test_a_required_argument_that_is_not_described_is_written_all_the_same():
    for properties in ({"properties": {"n": {}}}, {}):
        tool = {"name": "f", "parameters": {**properties, "required": ["n", "zz"]}}
        grammar = tool_use([tool], "required").structured.value
        assert "<parameter=n>" in grammar
        assert "<parameter=zz>" in grammar
