"""Items become the messages that the template knows, and say where they cannot."""

import pytest

from nemotron3.errors import DataError
from nemotron3.inference.output_processor import AnswerDelta, CompletionOutput, DraftStats
from nemotron3.inference.requests import FinishReason
from nemotron3.server.http.errors import APIError
from nemotron3.server.responses.events import ItemEvents
from nemotron3.server.responses.items import items_of, messages_of, output_items
from nemotron3.server.responses.store import ResponseStore
from nemotron3.text import CallDelta, ParsedCall

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
REASONING = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "why"}]}


def said(text):
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "role": "assistant", "content": [part]}


def asked(text):
    return {"role": "user", "content": text}


def test_a_text_is_what_the_user_says():
    assert messages_of(items_of("Hi"), "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_neighbouring_items_of_the_assistant_are_one_turn():
    items = [asked("Hi"), REASONING, said("I look."), CALL, CALL | {"call_id": "c2"}, OUTPUT]
    messages = messages_of(items, None)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    turn = messages[1]
    assert turn["reasoning_content"] == "why"
    assert turn["content"] == "I look."
    assert [call["id"] for call in turn["tool_calls"]] == ["c1", "c2"]
    assert messages[2] == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def test_reasoning_and_a_second_text_begin_new_turns():
    messages = messages_of([asked("Hi"), said("a"), said("b"), REASONING, CALL], None)
    assert [message.get("content") for message in messages] == ["Hi", "a", "b", None]
    assert messages[3]["reasoning_content"] == "why"


def test_a_summary_stands_for_reasoning_that_is_not_there():
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}
    assert messages_of([item], None)[0]["reasoning_content"] == "short"


@pytest.mark.parametrize(
    ("item", "where"),
    [
        ({"type": "computer_call"}, r"input\[0\]\.type is 'computer_call'"),
        ({"role": "friend", "content": "x"}, r"input\[0\]\.role is 'friend'"),
        ({"role": "user"}, r"input\[0\]\.content is not a text"),
        ({"role": "user", "content": [{"type": "input_image"}]}, r"input\[0\]\.content\[0\]"),
        ({"type": "function_call_output", "output": 3}, r"input\[0\]\.output"),
    ],
)
def test_what_cannot_be_read_is_named(item, where):
    with pytest.raises(DataError, match=where):
        messages_of([item], None)


def test_an_item_of_the_previous_response_is_none_of_the_input():
    cut = CALL | {"arguments": '{"a": "b'}
    said = r"previous_response_id: that conversation cannot be continued; items\[1\]\.arguments"
    with pytest.raises(DataError, match=said) as caught:
        messages_of([asked("Hi"), cut, asked("x")], None, num_stored=2)
    assert caught.value.field == "previous_response_id"
    with pytest.raises(DataError) as caught:
        messages_of([asked("Hi"), asked("x"), cut], None, num_stored=2)
    assert caught.value.field == "input[0].arguments"


def test_the_store_forgets_the_oldest():
    store = ResponseStore(max_responses=2)
    for name in ("a", "b"):
        store.put({"id": name}, [])
    store.get("a", "response_id")
    store.put({"id": "c"}, [])
    assert store.get("a", "response_id").body == {"id": "a"}
    with pytest.raises(APIError, match="forgotten"):
        store.get("b", "response_id")


def test_the_store_is_bounded_in_size():
    store = ResponseStore(max_bytes=200)
    store.put({"id": "a"}, [asked("x" * 100)])
    store.put({"id": "b"}, [asked("x" * 100)])
    store.put({"id": "large"}, [asked("x" * 300)])
    assert store.get("b", "response_id").size_bytes > 100
    for name in ("a", "large"):
        with pytest.raises(APIError):
            store.get(name, "response_id")
    store.delete("b")
    store.put({"id": "c"}, [asked("x" * 150)])
    assert store.get("c", "response_id")


def test_a_call_that_was_cut_off_is_incomplete_in_a_stream_and_as_a_whole():
    events = ItemEvents(None, is_single=False, with_logprobs=False)
    parts = [
        CallDelta(0, name="f"),
        CallDelta(0, arguments='{"a": "b'),
        CallDelta(1, name="f"),
        CallDelta(1, arguments="{}"),
    ]
    events.push(AnswerDelta(index=0, parts=tuple(parts), token_ids=()))
    events.finish(is_whole=True)
    answer = CompletionOutput(
        index=0,
        text="",
        token_ids=(),
        weight_versions=(),
        logprobs=(),
        content_logprobs=(),
        stop_reason=None,
        reasoning="",
        content="",
        num_reasoning_tokens=0,
        acceptance=DraftStats(),
        tool_calls=(ParsedCall("f", '{"a": "b'), ParsedCall("f", "{}", is_complete=True)),
        finish_reason=FinishReason.STOP,
    )
    whole = output_items(None, answer, is_single=False, with_logprobs=False)
    for items in (events.items, whole):
        assert [item["arguments"] for item in items] == ['{"a": "b', "{}"]
        assert [item["status"] for item in items] == ["incomplete", "completed"]
