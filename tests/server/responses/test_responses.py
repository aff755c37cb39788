"""Responses by the official client: items whole and as events, stored and gone on from."""

import json

import pytest
from openai import APIError, BadRequestError, NotFoundError

from tests.server.chat.test_chat import WEATHER
from tests.server.serving import MODEL, running, write_model

TOOL = {"type": "function", **WEATHER["function"]}


def respond(client, given="Hello there", *, extra=None, **options):
    options = {"model": MODEL, "max_output_tokens": 40} | options
    extra = {"seed": 1, "reasoning_budget": 4} | (extra or {})
    return client.responses.create(input=given, extra_body=extra, **options)


def test_an_answer_is_reasoning_and_a_message(client):
    answer = respond(client, instructions="Be brief.", metadata={"a": "b"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text
    assert answer.output_text == answer.output[1].content[0].text
    assert answer.output_text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[1].status == "incomplete"
    assert answer.usage.output_tokens == 40
    assert answer.usage.output_tokens_details.reasoning_tokens >= 4
    assert answer.metadata == {"a": "b"}
    assert answer.instructions == "Be brief."


def test_an_answer_that_ends_by_itself_is_complete(client):
    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = respond(client, extra=form)
    assert answer.status == "completed"
    assert answer.output_text in ("yes", "no")
    assert answer.incomplete_details is None


def test_a_format_holds(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    answer = respond(client, text=form, max_output_tokens=300)
    assert isinstance(json.loads(answer.output_text)["a"], bool)
    assert answer.text.format.type == "json_schema"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reasoning": {"effort": "none"}},
        {"extra": {"structured_outputs": {"choice": ["yes", "no"]}}},
        {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 300},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"max_output_tokens": 2},
    ],
    ids=["plain", "no reasoning", "a form", "calls", "logprobs", "cut in the reasoning"],
)
def test_events_add_up_to_the_whole(client, options):
    whole = respond(client, **options)
    events = list(respond(client, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == f"response.{whole.status}"

    def shown(response):
        items = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
        for item in items:
            if item["type"] == "reasoning":
                item["status"] = None
        return items

    plain = [
        [{k: v for k, v in item.items() if k != "content"} for item in shown(response)]
        for response in (whole, last.response)
    ]
    assert plain[0] == plain[1]
    assert whole.output_text == last.response.output_text
    added = [event for event in events if event.type == "response.output_item.added"]
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in added] == list(range(len(whole.output)))
    assert [event.item.id for event in added] == [event.item.id for event in done]
    deltas = {
        "message": "response.output_text.delta",
        "function_call": "response.function_call_arguments.delta",
        "reasoning": "response.reasoning_text.delta",
    }
    for event in done:
        pieces = [
            each.delta
            for each in events
            if each.type == deltas[event.item.type] and each.item_id == event.item.id
        ]
        text = getattr(event.item, "arguments", None)
        if text is None:
            text = "".join(part.text for part in event.item.content)
        assert "".join(pieces) == text


def test_the_clients_own_reading_of_the_stream(client):
    with client.responses.stream(
        model=MODEL,
        input="Hello",
        tools=[TOOL],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=300,
        extra_body={"reasoning_budget": 3},
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    call = final.output[-1]
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")


def test_a_tools_answer_goes_on_from_what_is_stored(client, served):
    first = respond(client, tools=[TOOL], tool_choice="required", max_output_tokens=300)
    call = first.output[-1]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = respond(client, [output], previous_response_id=first.id, tools=[TOOL])
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    # The same conversation, sent whole by a client that lets nothing be stored.
    items = [{"role": "user", "content": "Hello there"}]
    items += [item.model_dump(exclude_none=True) for item in first.output]
    third = respond(client, [*items, output], tools=[TOOL], store=False)
    assert third.output_text == second.output_text
    with pytest.raises(NotFoundError):
        respond(client, "and?", previous_response_id=third.id)


def test_stored_responses_can_be_read_and_forgotten(client):
    answer = respond(client)
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    client.responses.delete(answer.id)
    with pytest.raises(NotFoundError, match="forgotten"):
        client.responses.retrieve(answer.id)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"input": [{"type": "computer_call"}]}, r"input\[0\].type"),
        ({"input": []}, "input"),
        ({"reasoning": {"effort": "low"}}, "effort"),
        ({"top_logprobs": 2}, "needs include"),
        ({"text": {"format": {"type": "json_object"}}, "tools": [TOOL]}, "no tool could be called"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"reasoning": {"effort": "low"}}, r"reasoning\.effort = "),
        (
            {"max_output_tokens": 5, "extra": {"min_tokens": 50}},
            r"min_tokens is 50; it must be at most max_output_tokens \(5\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, options, said):
    given = options.pop("input", "Hello")
    with pytest.raises(BadRequestError, match=said):
        respond(client, given, **options)


def test_the_models_own_defaults_hold_where_nothing_is_said(tmp_path):
    folder = write_model(tmp_path)
    defaults = {"temperature": 0.5, "top_p": 0.75, "max_new_tokens": 3, "eos_token_id": [2, 11]}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    with running(folder) as server:
        said = {"input": "Hello", "ignore_eos": True}
        answer = server.post("/v1/responses", said).json()
        assert (answer["temperature"], answer["top_p"]) == (0.5, 0.75)
        assert answer["usage"]["output_tokens"] == 3
        answer = server.post("/v1/responses", said | {"top_p": 1.0, "max_output_tokens": 5}).json()
        assert (answer["temperature"], answer["top_p"]) == (0.5, 1.0)
        assert answer["usage"]["output_tokens"] == 5
        chat = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}
        assert server.post("/v1/chat/completions", chat).json()["usage"]["completion_tokens"] == 3
        text = {"prompt": "Hello", "ignore_eos": True}
        assert server.post("/v1/completions", text).json()["usage"]["completion_tokens"] == 16


def test_an_answer_that_fails_in_the_stream_says_so(client, served):
    token = served.llm.tokenizer.encode("Q")[0]
    extra = {"structured_outputs": {"regex": "Q"}, "stop_token_ids": [token]}
    events = list(respond(client, stream=True, extra=extra))
    assert events[-1].type == "response.failed"
    assert "no token can continue" in events[-1].response.error.message
    with pytest.raises(APIError):
        respond(client, extra=extra)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_are_those_of_the_words(client, is_streamed):
    """Not of the reasoning, the tags and the end; and of all words, also those that were held."""
    options = {"include": ["message.output_text.logprobs"], "max_output_tokens": 40}
    options |= {"temperature": 1.5, "extra": {"reasoning_budget": 3, "stop": ["zq"]}}
    answer = respond(client, stream=is_streamed, **options)
    if is_streamed:
        answer = list(answer)[-1].response
    (part,) = next(item for item in answer.output if item.type == "message").content
    spelled = bytes(byte for each in part.logprobs for byte in each.bytes)
    assert spelled.decode(errors="replace").lstrip() == part.text
    assert part.text
