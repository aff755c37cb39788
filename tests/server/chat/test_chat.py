"""Chats by the official client: what it asks for is what comes, whole and streamed alike."""

import json

import pytest
from openai import APIError, BadRequestError
from pydantic import BaseModel

from tests.server.serving import MODEL, running, write_model

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "is_brief": {"type": "boolean"},
            },
            "required": ["city", "is_brief"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
SPELLINGS = {
    "NVIDIA's": lambda budget: {"reasoning_budget": budget},
    "vLLM's": lambda budget: {"thinking_token_budget": budget},
    "among the template's": lambda budget: {"chat_template_kwargs": {"reasoning_budget": budget}},
}


def ask(client, messages=HELLO, *, extra=None, **options):
    options = {"max_completion_tokens": 40, "seed": 1, "model": MODEL} | options
    return client.chat.completions.create(messages=messages, extra_body=extra, **options)


def joined(chunks):
    """What a stream of one answer comes to: texts, calls, how it ended, usage."""
    message = {"reasoning": "", "reasoning_content": "", "content": ""}
    calls, finish, usage = [], None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index == 0
            finish = choice.finish_reason or finish
            for name in message:
                message[name] += getattr(choice.delta, name, None) or ""
            for call in choice.delta.tool_calls or ():
                if call.index == len(calls):
                    assert call.id
                    assert call.type == "function"
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments or ""
    return message, calls, finish, usage


def test_an_answer_has_reasoning_content_and_a_bill(client):
    answer = ask(client, extra={"reasoning_budget": 8})
    message, usage = answer.choices[0].message, answer.usage
    assert answer.model == MODEL
    assert answer.object == "chat.completion"
    assert message.role == "assistant"
    assert message.reasoning
    assert message.reasoning == message.reasoning_content
    assert message.content
    assert "think>" not in message.content
    assert usage.completion_tokens == 40
    assert usage.total_tokens == usage.prompt_tokens + 40
    assert 1 <= usage.completion_tokens_details.reasoning_tokens <= 9
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"extra": {"reasoning_budget": 6}},
        {"extra": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"temperature": 0, "extra": {"reasoning_budget": 3}},
        {"extra": {"reasoning_budget": 4, "ignore_eos": True, "structured_outputs": None}},
    ],
)
def test_a_stream_adds_up_to_the_whole(client, options):
    whole = ask(client, **options)
    chunks = ask(client, stream=True, stream_options={"include_usage": True}, **options)
    message, _, finish, usage = joined(chunks)
    expected = whole.choices[0].message
    assert message["content"] == expected.content
    assert message["reasoning"] == (expected.reasoning or "")
    assert message["reasoning_content"] == message["reasoning"]
    assert finish == whole.choices[0].finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens
    reasoning = whole.usage.completion_tokens_details.reasoning_tokens
    assert usage.completion_tokens_details.reasoning_tokens == reasoning


def test_usage_comes_only_where_it_is_asked_for(client):
    assert all(chunk.usage is None for chunk in ask(client, stream=True))
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk.usage.completion_tokens
        for chunk in ask(client, stream=True, stream_options=options)
        if chunk.usage
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 40
    assert len(set(counts)) > 5


@pytest.mark.parametrize("budget", [0, 5, 17])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_the_budget_holds_in_every_spelling(client, spelling, budget):
    answer = ask(client, extra=spelling(budget) | {"ignore_eos": True})
    details = answer.usage.completion_tokens_details
    assert details.reasoning_tokens == budget
    assert answer.choices[0].message.content


def test_the_budget_waits_for_a_line_end_within_its_grace(client, served):
    line_end = served.llm.tokenizer.encode("\n")[0]
    extra = {"reasoning_budget": 5, "reasoning_grace": 10, "logit_bias": {str(line_end): -100}}
    late = ask(client, extra=extra).usage.completion_tokens_details.reasoning_tokens
    assert late == 15


@pytest.mark.parametrize(
    "extra",
    [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}],
)
def test_without_thinking_everything_is_content(client, extra):
    answer = ask(client, extra=extra)
    assert answer.choices[0].message.reasoning is None
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_reasoning_that_never_ends_leaves_the_content_empty_unless_told_otherwise(client, served):
    bias = {str(served.llm.tokenizer.think_end_id): -100}
    extra = {"logit_bias": bias, "ignore_eos": True}
    message = ask(client, extra=extra).choices[0].message
    assert message.content == ""
    assert message.reasoning
    extra["chat_template_kwargs"] = {"force_nonempty_content": True}
    forced = ask(client, extra=extra).choices[0].message
    assert forced.content == message.reasoning
    assert forced.reasoning is None
    streamed, *_ = joined(ask(client, extra=extra, stream=True))
    assert streamed["content"] == message.reasoning


def test_reasoning_can_be_left_out(client):
    extra = {"reasoning_budget": 5, "include_reasoning": False}
    message = ask(client, extra=extra).choices[0].message
    assert not hasattr(message, "reasoning")
    streamed, *_ = joined(ask(client, extra=extra, stream=True))
    assert (streamed["reasoning"], streamed["content"]) == ("", message.content)


class Weather(BaseModel):
    """What the test asks for."""

    is_sunny: bool
    sky: list[bool]


def test_a_schema_holds_after_the_reasoning(client):
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        response_format=Weather,
        seed=3,
        max_completion_tokens=900,
        extra_body={"reasoning_budget": 4},
    )
    message = parsed.choices[0].message
    assert isinstance(message.parsed, Weather)
    assert message.reasoning


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[ab]{3}"}, lambda text: len(text) == 3 and set(text) <= {"a", "b"}),
        ({"grammar": 'start: "x" | "y"'}, lambda text: text in ("x", "y")),
        ({"json": {"type": "boolean"}}, lambda text: isinstance(json.loads(text), bool)),
    ],
)
def test_other_forms_hold_too(client, form, fits):
    answer = ask(client, extra={"structured_outputs": form, "reasoning_budget": 2})
    assert answer.choices[0].finish_reason == "stop"
    assert fits(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", None),
        ({"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
    ],
)
def test_a_call_that_is_asked_for_comes(client, choice, name, stream):
    options = {
        "tools": [WEATHER, TIME] if name else [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_completion_tokens": 300,
        "extra": {"reasoning_budget": 3},
    }
    answer = ask(client, stream=stream, **options)
    if stream:
        message, calls, finish, _ = joined(answer)
        content, reasoning = message["content"], message["reasoning"]
    else:
        message, finish = answer.choices[0].message, answer.choices[0].finish_reason
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        content, reasoning = message.content, message.reasoning
    assert finish == "tool_calls"
    assert reasoning
    assert not content
    ((called, arguments),) = calls
    assert called == "get_weather"
    arguments = json.loads(arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert isinstance(arguments["is_brief"], bool)


def test_a_call_that_was_cut_off_is_not_one_to_run(client):
    answer = ask(
        client,
        tools=[WEATHER],
        tool_choice="required",
        max_completion_tokens=55,
        extra={"reasoning_budget": 0},
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    for call in choice.message.tool_calls or ():
        with pytest.raises(json.JSONDecodeError):
            json.loads(call.function.arguments)


def test_a_conversation_with_a_tools_answer_goes_on(client):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "is_brief": true}'},
    }
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "reasoning": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert ask(client, messages, tools=[WEATHER]).choices[0].finish_reason


def test_log_probabilities_are_of_every_token(client):
    answer = ask(client, temperature=0, logprobs=True, top_logprobs=3, max_completion_tokens=12)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    chunks = ask(
        client,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        max_completion_tokens=12,
        stream=True,
    )
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == pytest.approx([e.logprob for e in entries])


def test_log_probabilities_of_the_prompt(client):
    answer = ask(client, extra={"prompt_logprobs": 2, "return_token_ids": True})
    ids, entries = answer.prompt_token_ids, answer.prompt_logprobs
    assert len(ids) == len(entries) == answer.usage.prompt_tokens
    assert entries[0] is None
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        assert entry[str(token)]["logprob"] <= 0
        assert entry[str(token)]["rank"] >= 1
        assert len(entry) in (2, 3)
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens


def test_several_answers_share_a_prompt(client):
    answer = ask(client, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.reasoning for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 120
    seen = {choice.index for chunk in ask(client, n=3, stream=True) for choice in chunk.choices}
    assert seen == {0, 1, 2}


def test_a_seed_repeats_an_answer(client):
    texts = [ask(client, seed=seed).choices[0].message.reasoning for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("includes", [False, True])
def test_a_stop_string_ends_an_answer(client, includes):
    extra = {
        "chat_template_kwargs": {"enable_thinking": False},
        "structured_outputs": {"regex": "abcdefQrst"},
        "include_stop_str_in_output": includes,
    }
    answer = ask(client, stop=["no", "efQ"], extra=extra)
    choice = answer.choices[0]
    assert choice.message.content == ("abcdefQ" if includes else "abcd")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "efQ")
    assert answer.usage.completion_tokens <= 7


@pytest.mark.parametrize("includes", [False, True])
def test_a_stop_token_ends_an_answer(client, served, includes):
    token = served.llm.tokenizer.encode("Q")[0]
    extra = {
        "chat_template_kwargs": {"enable_thinking": False},
        "stop_token_ids": [token],
        "include_stop_str_in_output": includes,
    }
    answer = ask(client, logit_bias={str(token): 100}, extra=extra)
    choice = answer.choices[0]
    assert choice.message.content == ("Q" if includes else "")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)


def test_a_form_that_cannot_be_held_is_the_clients_to_change(client, served):
    token = served.llm.tokenizer.encode("Q")[0]
    extra = {
        "chat_template_kwargs": {"enable_thinking": False},
        "structured_outputs": {"regex": "Q"},
        "stop_token_ids": [token],
    }
    with pytest.raises(BadRequestError, match="no token can continue"):
        ask(client, extra=extra)
    with pytest.raises(APIError, match="no token can continue"):
        list(ask(client, extra=extra, stream=True))
    assert ask(client).choices[0].finish_reason


def test_a_bias_decides(client, served):
    token = served.llm.tokenizer.encode("Z")[0]
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = ask(client, logit_bias={str(token): 100}, extra=extra, max_completion_tokens=5)
    assert answer.choices[0].message.content == "ZZZZZ"


def test_the_end_can_be_put_off(client, served):
    ends = dict.fromkeys(map(str, served.llm.tokenizer.stop_ids), 100)
    assert ask(client, logit_bias=ends).usage.completion_tokens == 1
    later = ask(client, logit_bias=ends, extra={"min_tokens": 4})
    assert later.usage.completion_tokens == 5
    assert later.choices[0].finish_reason == "stop"
    never = ask(client, logit_bias=ends, extra={"ignore_eos": True})
    assert never.usage.completion_tokens == 40


def test_a_prompt_that_was_there_before_is_not_read_again(client):
    messages = [{"role": "user", "content": "Once upon a time there was a server. " * 9}]
    counts = [
        ask(client, messages, max_completion_tokens=2).usage.prompt_tokens_details.cached_tokens
        for _ in range(2)
    ]
    assert counts[0] < counts[1]


def test_an_effort_is_a_hint_to_the_models_that_know_it(tmp_path):
    with running(write_model(tmp_path, style="super")) as server:
        chat = {"messages": HELLO, "max_tokens": 1, "return_token_ids": True}
        prompts = [
            server.llm.tokenizer.decode(server.post(PATH, chat | more).json()["prompt_token_ids"])
            for more in (
                {"reasoning_effort": "low"},
                {"chat_template_kwargs": {"low_effort": True}},
                {"reasoning_effort": "high"},
                {},
            )
        ]
        refused = server.post(PATH, chat | {"reasoning_effort": "medium"})
    assert "{reasoning effort: low}" in prompts[0]
    assert prompts[0] == prompts[1]
    assert prompts[2] == prompts[3] == prompts[0].replace("\n\n{reasoning effort: low}", "")
    assert refused.status_code == 400
    assert "efforts: low" in refused.json()["error"]["message"]
