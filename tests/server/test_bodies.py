"""Bodies are closed and strict, and every field of theirs reaches the engine's parameters."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from nemotron3.errors import ConfigError
from nemotron3.inference.requests import StructuredOutput
from nemotron3.server.chat.body import ChatBody
from nemotron3.server.chat.plan import plan_chat
from nemotron3.server.completions.body import CompletionBody
from nemotron3.server.completions.plan import plan_completion
from nemotron3.server.generation.sampling import SamplingBody
from nemotron3.server.generation.thinking import ChatTemplateKwargs
from nemotron3.server.http.bodies import Unsupported
from nemotron3.server.http.errors import APIError
from nemotron3.server.responses.body import ResponsesBody
from nemotron3.server.responses.items import items_of
from nemotron3.server.responses.plan import plan_response

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL_CALL_END = 15
NOTES = {"model", "user", "metadata", "safety_identifier", "prompt_cache_key", "stream"}

SAMPLING = {
    "temperature": ({"temperature": 0.5}, {"temperature": 0.5}),
    "a whole number": ({"temperature": 1}, {"temperature": 1.0}),
    "top_p": ({"top_p": 0.9}, {"top_p": 0.9}),
    "top_k": ({"top_k": 7}, {"top_k": 7}),
    "all tokens, in vLLM's words": ({"top_k": -1}, {"top_k": 0}),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.1}),
    "presence_penalty": ({"presence_penalty": 1.0}, {"presence_penalty": 1.0}),
    "frequency_penalty": ({"frequency_penalty": 1.0}, {"frequency_penalty": 1.0}),
    "repetition_penalty": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "logit_bias": ({"logit_bias": {"7": -3}}, {"logit_bias": {7: -3.0}}),
    "seed": ({"seed": 9}, {"seed": 9}),
    "stop": ({"stop": "a"}, {"stop": ("a",)}),
    "stops": ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    "stop_token_ids": ({"stop_token_ids": [3]}, {"stop_token_ids": (3,)}),
    "include_stop_str_in_output": (
        {"include_stop_str_in_output": True},
        {"include_stop_str_in_output": True},
    ),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
    "min_tokens": ({"min_tokens": 3}, {"min_tokens": 3}),
    "structured_outputs": (
        {"structured_outputs": {"regex": "a+"}},
        {"structured": StructuredOutput(kind="regex", value="a+")},
    ),
    "reasoning_budget": ({"reasoning_budget": 5}, {"reasoning_budget": 5}),
    "thinking_token_budget": ({"thinking_token_budget": 5}, {"reasoning_budget": 5}),
    "reasoning_grace": ({"reasoning_grace": 5}, {"reasoning_grace": 5}),
}
CHAT = {
    "n": ({"n": 2}, {"n": 2}),
    "max_tokens": ({"max_tokens": 3}, {"max_tokens": 3}),
    "max_completion_tokens": ({"max_completion_tokens": 3}, {"max_tokens": 3}),
    "both, the same": ({"max_completion_tokens": 3, "max_tokens": 3}, {"max_tokens": 3}),
    "logprobs": ({"logprobs": True}, {"logprobs": 0}),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
    "prompt_logprobs": ({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
    "response_format": (
        {"response_format": {"type": "json_object"}},
        {"structured": StructuredOutput(kind="json_object")},
    ),
    "text": ({"response_format": {"type": "text"}}, {"structured": None}),
    "a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"structured": StructuredOutput(kind="json_schema", value={})},
    ),
    "a budget among the template's": (
        {"chat_template_kwargs": {"reasoning_budget": 5}},
        {"reasoning_budget": 5},
    ),
    "three spellings of one budget": (
        {
            "reasoning_budget": 5,
            "thinking_token_budget": 5,
            "chat_template_kwargs": {"thinking_token_budget": 5},
        },
        {"reasoning_budget": 5},
    ),
    "one call": (
        {"tools": [{"name": "f"}], "parallel_tool_calls": False},
        {"stop_token_ids": (TOOL_CALL_END,)},
    ),
}
OPTIONS = {
    "thinking": ({"enable_thinking": False}, {"enable_thinking": False}),
    "history": ({"truncate_history_thinking": False}, {"truncate_history_thinking": False}),
    "low": ({"low_effort": True}, {"effort": "low"}),
    "not low": ({"low_effort": False}, {}),
    "medium": ({"medium_effort": True}, {"effort": "medium"}),
    "hint": ({"budget_hint": 9}, {"budget_hint": 9}),
    "content": ({"force_nonempty_content": True}, {"force_nonempty_content": True}),
}
EFFORTS = {
    "none": {"enable_thinking": False},
    "low": {"effort": "low"},
    "medium": {"effort": "medium"},
    "high": {},
}
CONTRADICTIONS = {
    "two budgets": (
        {"reasoning_budget": 3, "thinking_token_budget": 4},
        "reasoning_budget = 3, thinking_token_budget = 4: these name one setting",
    ),
    "a budget here and there": (
        {"reasoning_budget": 3, "chat_template_kwargs": {"reasoning_budget": 4}},
        "chat_template_kwargs.reasoning_budget = 4",
    ),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "these name one setting"),
    "two efforts": (
        {"chat_template_kwargs": {"low_effort": True, "medium_effort": True}},
        "these name one setting",
    ),
    "effort none while thinking": (
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
        "leave one out",
    ),
    "effort without thinking": (
        {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
        "leave one out",
    ),
    "two forms": (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex and response_format ask for different outputs",
    ),
    "two forms in one": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "regex, choice"),
    "no form": ({"structured_outputs": {}}, "has nothing"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "has no schema"),
    "a form and tools": (
        {"response_format": {"type": "json_object"}, "tools": [{"name": "f"}]},
        "no tool could be called",
    ),
    "alternatives without any": ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, "send stream: true"),
    "usage all along without usage": (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "needs include_usage",
    ),
    "a bias for a word": ({"logit_bias": {"the": 1}}, "a map of token ids"),
}


def holds(params, expected):
    return {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(("given", "expected"), SAMPLING.values(), ids=SAMPLING.keys())
def test_sampling_reaches_the_engine_from_every_endpoint(given, expected):
    chat = ChatBody.model_validate({"messages": MESSAGES, **given})
    assert holds(plan_chat(chat, TOOL_CALL_END).params, expected)
    completion = CompletionBody.model_validate({"prompt": "Hi", **given})
    assert holds(plan_completion(completion), expected)
    response = ResponsesBody.model_validate({"input": "Hi", **given})
    plan = plan_response(response, items_of("Hi"), TOOL_CALL_END)
    assert holds(plan.params, expected)


def test_every_field_of_sampling_is_tried_above():
    tried = {name for given, _ in SAMPLING.values() for name in given}
    assert tried | NOTES == set(SamplingBody.model_fields)


@pytest.mark.parametrize(("given", "expected"), CHAT.values(), ids=CHAT.keys())
def test_a_chats_fields_reach_the_engine(given, expected):
    body = ChatBody.model_validate({"messages": MESSAGES, **given})
    assert holds(plan_chat(body, TOOL_CALL_END).params, expected)


@pytest.mark.parametrize(("given", "expected"), OPTIONS.values(), ids=OPTIONS.keys())
def test_a_chats_options_reach_the_template(given, expected):
    body = ChatBody.model_validate({"messages": MESSAGES, "chat_template_kwargs": given})
    assert plan_chat(body, TOOL_CALL_END).options == expected


@pytest.mark.parametrize(("effort", "expected"), EFFORTS.items())
def test_an_effort_is_what_the_template_knows_of_it(effort, expected):
    body = ChatBody.model_validate({"messages": MESSAGES, "reasoning_effort": effort})
    assert plan_chat(body, TOOL_CALL_END).options == expected
    body = ResponsesBody.model_validate({"input": "Hi", "reasoning": {"effort": effort}})
    assert plan_response(body, items_of("Hi"), TOOL_CALL_END).options == expected


@pytest.mark.parametrize(("given", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_refused_whoever_would_win(given, said):
    body = ChatBody.model_validate({"messages": MESSAGES, **given})
    with pytest.raises(APIError) as refused:
        plan_chat(body, TOOL_CALL_END)
    assert said in refused.value.message
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"temperature": "0.5"}, "float_type"),
        ({"temperature": True}, "float_type"),
        ({"top_k": 1.5}, "int_type"),
        ({"stream": 1}, "bool_type"),
        ({"temprature": 1}, "extra_forbidden"),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, "extra_forbidden"),
        ({"reasoning_effort": "extreme"}, "literal_error"),
        ({"guided_json": {}}, "unsupported"),
        ({"functions": []}, "unsupported"),
        ({"store": True}, "unsupported"),
    ],
)
def test_a_body_bends_no_type_and_takes_no_unknown_name(given, kind):
    with pytest.raises(ValidationError) as refused:
        ChatBody.model_validate({"messages": MESSAGES, **given})
    assert refused.value.errors()[0]["type"] == kind


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, ResponsesBody])
def test_values_that_ask_for_what_happens_anyway_are_taken(body):
    required = {
        ChatBody: {"messages": MESSAGES},
        CompletionBody: {"prompt": "Hi"},
        ResponsesBody: {"input": "Hi"},
    }[body]
    rules: dict[str, Unsupported] = dict(body.unsupported)
    for name, rule in rules.items():
        for value in (None, *rule.harmless):
            body.model_validate({**required, name: value})
        assert name not in body.model_fields
        assert rule.remedy


def test_a_completion_without_tokens_is_for_echo_alone():
    assert plan_completion(CompletionBody(prompt="Hi", max_tokens=0, echo=True)).max_tokens == 1
    assert plan_completion(CompletionBody(prompt="Hi")).max_tokens == 16
    with pytest.raises(APIError, match="max_tokens is 0"):
        plan_completion(CompletionBody(prompt="Hi", max_tokens=0))
    with pytest.raises(ConfigError, match="max_tokens is -1"):
        plan_completion(CompletionBody(prompt="Hi", max_tokens=-1))
    echoed = plan_completion(CompletionBody(prompt="Hi", echo=True, logprobs=2))
    assert (echoed.logprobs, echoed.prompt_logprobs) == (2, 2)
    with pytest.raises(APIError, match="echo is not part of a stream"):
        plan_completion(CompletionBody(prompt="Hi", echo=True, stream=True))


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, ResponsesBody, ChatTemplateKwargs])
def test_the_guide_names_every_parameter(body):
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    missing = [name for name in body.model_fields if not re.search(rf"`[^`]*\b{name}\b", guide)]
    assert missing == []


DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def test_the_models_defaults_hold_where_a_request_says_nothing():
    """At every endpoint."""
    said = {"temperature": 0.0, "top_k": 0}
    for given, expected in (({}, DEFAULTS), (said, DEFAULTS | said)):
        chat = plan_chat(ChatBody(messages=MESSAGES, **given), TOOL_CALL_END, DEFAULTS)
        completion = plan_completion(CompletionBody(prompt="Hi", **given), DEFAULTS)
        body = ResponsesBody(input="Hi", **given)
        response = plan_response(body, items_of("Hi"), TOOL_CALL_END, DEFAULTS)
        for params in (chat.params, completion, response.params):
            assert holds(params, expected)
