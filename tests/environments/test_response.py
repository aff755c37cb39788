"""Responses: what counts as the answer, and the wire of NeMo Gym."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.environments import TaskResponse, from_items, to_dict, to_items
from nemotron3.errors import DataError
from nemotron3.text import (
    AssistantMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    parse_messages,
)

texts = st.text(max_size=12)
arguments = st.dictionaries(
    st.text(min_size=1, max_size=4), st.none() | st.booleans() | st.integers() | texts, max_size=2
)


@st.composite
def conversations(draw):
    """Turns of the assistant, each with its tools' answers or a user's turn after it."""
    messages = []
    for turn in range(draw(st.integers(1, 4))):
        calls = [
            ToolCall(name=draw(st.sampled_from(["f", "g"])), arguments=given, id=f"call_{turn}_{i}")
            for i, given in enumerate(draw(st.lists(arguments, max_size=2)))
        ]
        reasoning = draw(st.none() | texts)
        messages.append(
            AssistantMessage(content=draw(texts), reasoning=reasoning, tool_calls=tuple(calls))
        )
        if calls:
            messages += [ToolMessage(content=draw(texts), tool_call_id=c.id) for c in calls]
        else:
            messages.append(
                draw(st.sampled_from([UserMessage, SystemMessage]))(content=draw(texts))
            )
    return tuple(messages[: draw(st.integers(1, len(messages)))])


@given(conversations())
def test_items_and_dictionaries_are_the_same_conversation(messages):
    assert from_items(to_items(messages)) == messages
    assert parse_messages([to_dict(message) for message in messages]) == messages


@given(conversations(), st.booleans())
def test_responses_survive_the_wire(messages, is_complete):
    response = TaskResponse(messages=messages, is_complete=is_complete)
    assert TaskResponse.from_gym(response.to_gym()) == response


def test_items_are_those_of_the_responses_api():
    call = ToolCall(name="f", arguments={"x": 1})
    messages = (
        AssistantMessage(reasoning="hm", tool_calls=(call,)),
        ToolMessage(content="2"),
        AssistantMessage(content="two"),
    )
    assert to_items(messages) == [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "2"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two", "annotations": []}],
        },
    ]


def test_answers_without_ids_are_those_of_the_calls_in_order():
    calls = (ToolCall(name="f"), ToolCall(name="g"))
    messages = [
        AssistantMessage(tool_calls=calls),
        ToolMessage(content="1"),
        ToolMessage(content="2"),
    ]
    items = to_items(messages)
    assert [item["call_id"] for item in items] == ["call_0", "call_1", "call_0", "call_1"]


def test_what_an_answer_is():
    said = {"role": "assistant", "content": " 3 \n", "reasoning_content": "4"}
    assert TaskResponse.of(said).answer == "3"
    assert TaskResponse.of(said, is_complete=False).answer == ""
    assert TaskResponse.of({**said, "content": ""}).answer == ""
    assert TaskResponse.of(said, {"role": "user", "content": "5"}).answer == ""
    call = {"function": {"name": "f", "arguments": "{}"}}
    response = TaskResponse.of({**said, "tool_calls": [call]})
    assert response.answer == ""
    assert response.tool_calls == (ToolCall(name="f"),)
    assert TaskResponse(messages=()).answer == ""


def test_gym_says_in_two_ways_that_a_response_was_cut():
    output = [{"type": "message", "role": "assistant", "content": "3"}]
    assert TaskResponse.from_gym({"output": output}).is_complete
    assert not TaskResponse.from_gym({"output": output, "status": "incomplete"}).is_complete
    details = {"reason": "max_output_tokens"}
    assert not TaskResponse.from_gym({"output": output, "incomplete_details": details}).is_complete
    parts = [{"type": "reasoning", "summary": [], "content": [{"text": "a"}, {"text": "b"}]}]
    assert TaskResponse.from_gym({"output": parts}).turns[0].reasoning == "ab"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([3], r"items\[0\] is of type int"),
        ([{"type": "image"}], r"items\[0\]\.type is 'image'"),
        ([{"role": "assistant", "content": 3}], r"items\[0\]\.content is no text"),
        ([{"role": "assistant", "content": [{"x": 1}]}], r"content\[0\] is no part with a text"),
        ([{"role": "king", "content": "x"}], "'king'"),
        ([{"type": "function_call", "name": "f", "arguments": "{"}], "is not JSON"),
        ([{"type": "function_call", "arguments": "{}"}], "name is None"),
        ([{"type": "function_call_output", "call_id": "a"}], r"output is no text"),
        ([{"type": "reasoning", "summary": 3}], "summary is no text"),
    ],
)
def test_bad_items_are_refused_with_their_place(items, said):
    with pytest.raises(DataError, match=said):
        from_items(items)


def test_a_response_without_output_is_refused():
    with pytest.raises(DataError, match=r"response\.output is no list"):
        TaskResponse.from_gym({"id": "resp_1"})
