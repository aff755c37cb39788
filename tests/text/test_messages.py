"""Reading OpenAI's dictionaries: what is accepted, and what is refused with its place."""

import pytest

from nemotron3.errors import DataError
from nemotron3.text.messages import (
    AssistantMessage,
    SystemMessage,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
    parse_messages,
    parse_tools,
)

USER = {"role": "user", "content": "hi"}


def test_every_role_is_read():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert parse_messages(
        [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "t", "tool_call_id": "1"},
        ]
    ) == (
        SystemMessage(content="s"),
        UserMessage(content="abc"),
        AssistantMessage(tool_calls=(ToolCall(id="1", name="f", arguments={"a": 1}),)),
        ToolMessage(content="t", tool_call_id="1"),
    )


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_has_two_names(key):
    (message,) = parse_messages([{"role": "assistant", "content": "x", key: "why"}])
    assert message == AssistantMessage(content="x", reasoning="why")


def test_typed_messages_and_tools_pass_through():
    message, tool = UserMessage(content="hi"), Tool(name="f")
    assert parse_messages([message]) == (message,)
    assert parse_tools([tool]) == (tool,)
    assert parse_tools(None) == ()


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments):
    call = {"name": "f", "arguments": arguments}
    (message,) = parse_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message.tool_calls == (ToolCall(name="f"),)


def test_tool_keeps_the_fields_it_does_not_know():
    (tool,) = parse_tools([{"type": "function", "function": {"name": "f", "strict": True}}])
    assert tool == Tool(name="f", extra={"strict": True})


def _calls(*calls):
    return [USER, {"role": "assistant", "tool_calls": list(calls)}]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hi", "messages is of type str"),
        (["hi"], r"messages\[0\] is of type str, an object"),
        ([{"content": "hi"}], r"messages\[0\]\.role is None; the roles are"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content is of type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]\.type is 'image"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text is missing"),
        ([USER, {"role": "assistant", "reasoning": 1}], r"messages\[1\]\.reasoning is of"),
        ([USER, {"role": "assistant", "is_trained": 1}], r"is_trained is of type int"),
        ([USER, {"role": "assistant", "tool_calls": {"a": 1}}], r"tool_calls is of type dict"),
        (_calls({"name": ""}), r"messages\[1\]\.tool_calls\[0\]\.name is ''"),
        (_calls({"name": "f" * 257}), r"messages\[1\]\.tool_calls\[0\]\.name has 257 characters"),
        (
            _calls({"name": "f", "arguments": '{"a":' * 100_000}),
            r"messages\[1\]\.tool_calls\[0\]\.arguments is nested too deep",
        ),
        (_calls({"name": "a>b"}), "a name holds no '<'"),
        (_calls({"function": "f"}), r"tool_calls\[0\]\.function is of type str"),
        (_calls({"name": "f", "arguments": "{"}), r"arguments is not JSON \(.* at character 1\)"),
        (_calls({"function": {"name": "f", "arguments": "[1]"}}), r"function\.arguments is of"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\] is a tool's answer and nothing"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(messages, complaint):
    with pytest.raises(DataError, match=complaint):
        parse_messages(messages)


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ({"name": "f"}, "tools is of type dict"),
        ([{"type": "web_search"}], r"tools\[0\]\.type is 'web_search'"),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.function\.name is None"),
        ([{"name": "f", "description": 1}], r"tools\[0\]\.description is of type int"),
        ([{"name": "f", "parameters": []}], r"tools\[0\]\.parameters is of type list"),
    ],
)
def test_what_is_no_tool_is_refused_with_its_place(tools, complaint):
    with pytest.raises(DataError, match=complaint):
        parse_tools(tools)
