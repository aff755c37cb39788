"""Rows in NeMo Gym's format."""

from dataclasses import replace

import pytest

from nemotron3.environments import (
    environment_of,
    field_of,
    make_row,
    prompt_of,
    prompt_text,
    split_of,
    tools_of,
)
from nemotron3.errors import DataError
from nemotron3.text import SystemMessage, Tool, UserMessage


def test_a_row_holds_prompt_tools_and_fields():
    tool = Tool(name="f", description="Do.", parameters={"type": "object"}, extra={"strict": True})
    messages = [SystemMessage(content="Be brief."), UserMessage(content="Hi")]
    row = make_row("mine", messages, tools=[tool], prompt="a field of that name")
    assert row == {
        "responses_create_params": {
            "input": [
                {"type": "message", "role": "system", "content": "Be brief."},
                {"type": "message", "role": "user", "content": "Hi"},
            ],
            "tools": [
                {
                    "type": "function",
                    "name": "f",
                    "description": "Do.",
                    "parameters": {"type": "object"},
                    "strict": True,
                }
            ],
            "parallel_tool_calls": False,
        },
        "agent_ref": {"type": "responses_api_agents", "name": "mine"},
        "prompt": "a field of that name",
    }
    assert prompt_of(row) == tuple(messages)
    assert prompt_text(row) == "Be brief.\nHi"
    assert tools_of(row) == (replace(tool, extra={}),)  # `strict` is not for a policy to read
    assert environment_of(row) == "mine"


def test_rows_of_others_can_be_read():
    text = {"responses_create_params": {"input": "Hi"}}
    assert prompt_of(text) == (UserMessage(content="Hi"),)
    assert tools_of(text) == ()
    plain = {"responses_create_params": {"input": [{"role": "user", "content": "Hi"}]}}
    assert prompt_of(plain) == prompt_of(text)
    assert split_of(plain) == split_of(text)


@pytest.mark.parametrize(
    ("row", "read", "said"),
    [
        ({}, prompt_of, "no responses_create_params"),
        ({"responses_create_params": {}}, prompt_of, "input is no text and no list"),
        ({"responses_create_params": {"input": []}}, prompt_of, "input is no text and no list"),
        ({"responses_create_params": {"input": [{}]}}, prompt_of, r"input\[0\]\.content"),
        ({"responses_create_params": {"tools": [{}]}}, tools_of, r"tools\[0\]\.name"),
        ({}, environment_of, r"no agent_ref\.name"),
        ({"agent_ref": {"name": 3}}, environment_of, r"no agent_ref\.name"),
    ],
)
def test_bad_rows_are_refused(row, read, said):
    with pytest.raises(DataError, match=said):
        read(row)


def test_fields_have_a_type():
    row = {"n": 3, "b": True, "s": "x"}
    assert field_of(row, "n", int) == 3
    assert field_of(row, "b", bool) is True
    assert field_of(row, "s", (str, int)) == "x"
    with pytest.raises(DataError, match="the row's b is of type bool; int was expected"):
        field_of(row, "b", int)
    with pytest.raises(DataError, match="the row's m is missing; str or int was expected"):
        field_of(row, "m", (str, int))
