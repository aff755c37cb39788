"""Calls that a model makes of its own accord, by the official client, whole and streamed."""

import json

import pytest
from openai import OpenAI

from tests.server import learned
from tests.server.chat.test_chat import joined
from tests.server.serving import MODEL, running

TOOL = {"type": "function", **learned.WEATHER["function"]}
CALLS = [("weather", {"city": "Paris", "days": 2}), ("weather", {"city": "Rome"})]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = learned.write_learned_model(tmp_path_factory.mktemp("learned"))
    with (
        running(folder) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client, *, stream=False, **options):
    """The parts of the answer, streamed or not."""
    options = {"messages": [learned.QUESTION], "tools": [learned.WEATHER]} | options
    answer = client.chat.completions.create(
        model=MODEL, temperature=0, max_tokens=200, stream=stream, **options
    )
    if stream:
        message, calls, finish, _ = joined(answer)
        return message["reasoning"], message["content"], calls, finish
    choice = answer.choices[0]
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
    assert choice.stop_reason is None
    return choice.message.reasoning, choice.message.content, calls, choice.finish_reason


def read(calls):
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_decides_to_call(client, stream):
    reasoning, content, calls, finish = ask(client, stream=stream)
    assert reasoning == learned.REASONING
    assert not content
    assert read(calls) == CALLS
    assert finish == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_is_where_the_answer_ends_if_one_is_wanted(client, stream):
    _, content, calls, finish = ask(client, stream=stream, parallel_tool_calls=False)
    assert read(calls) == CALLS[:1]
    assert finish == "tool_calls"
    assert not content


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_may_not_call_does_not(client, stream):
    assert ask(client, stream=stream, tool_choice="none")[2] == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_without_tools_is_reasoning_and_an_answer(client, stream):
    options = {"messages": [learned.GREETING], "tools": None}
    reasoning, content, calls, finish = ask(client, stream=stream, **options)
    assert (reasoning, content, calls) == (learned.GREETING_REASONING, learned.GREETED, [])
    assert finish == "stop"


def test_a_call_that_was_cut_off_does_not_end_with_tool_calls(client):
    for limit in range(20, 34, 3):
        options = {"extra_body": {"max_completion_tokens": limit, "max_tokens": limit}}
        _, _, calls, finish = ask(client, **options)
        assert finish == "length"
        if calls:
            with pytest.raises(json.JSONDecodeError):
                json.loads(calls[-1][1])


def test_a_required_call_is_what_the_model_would_have_said(client):
    _, _, calls, _ = ask(client, tool_choice="required")
    assert read(calls) == CALLS
    named = {"type": "function", "function": {"name": "weather"}}
    _, _, calls, _ = ask(client, tool_choice=named)
    assert read(calls) == CALLS[:1]


@pytest.mark.parametrize("is_parallel", [True, False])
def test_calls_are_items_of_a_response(client, is_parallel):
    asked = {
        "model": MODEL,
        "input": [learned.QUESTION],
        "tools": [TOOL],
        "temperature": 0,
        "parallel_tool_calls": is_parallel,
    }
    expected = CALLS if is_parallel else CALLS[:1]
    whole = client.responses.create(**asked)
    *_, last = client.responses.create(stream=True, **asked)
    for response in (whole, last.response):
        reasoning, *calls = response.output
        assert response.status == "completed"
        assert reasoning.content[0].text == learned.REASONING
        assert read((call.name, call.arguments) for call in calls) == expected
        assert len({call.call_id for call in calls}) == len(expected)
