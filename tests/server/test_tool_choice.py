"""The grammar of calls takes what the template writes, and nothing that is no call."""

import json

import pytest

from nemotron3.errors import DataError
from nemotron3.inference.structured_output import GrammarCompiler
from nemotron3.server.refusals import RefusedError
from nemotron3.server.tool_choice import tool_use
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
    """Whether the form lets every token of the text through, and an end after it."""
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
    with pytest.raises(RefusedError, match=said):
        tool_use(tools, choice, named=named)


def test_a_tool_that_cannot_be_read_is_named():
    with pytest.raises(DataError, match=r"tools\[1\]\.name"):
        tool_use([NOTHING, {"name": ""}], "auto")


def test_a_required_argument_that_is_not_described_is_written_all_the_same():
    for properties in ({"properties": {"n": {}}}, {}):
        tool = {"name": "f", "parameters": {**properties, "required": ["n", "zz"]}}
        grammar = tool_use([tool], "required").structured.value
        assert "<parameter=n>" in grammar
        assert "<parameter=zz>" in grammar
