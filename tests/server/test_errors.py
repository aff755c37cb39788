"""An error of a bad value has the client's name of the field, in `param` and in the message."""

import pytest

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
USER = {"role": "user", "content": "Hi"}
VALID = {
    CHAT: {"messages": [USER]},
    COMPLETIONS: {"prompt": "Hi"},
    RESPONSES: {"input": "Hi"},
    TOKENIZE: {},
    DETOKENIZE: {},
}
ANYTHING = {"type": "object", "properties": {"x": {}}}


def function(**fields):
    """A tool as chats have it."""
    return {"type": "function", "function": {"name": "f", **fields}}


def parameters(schema):
    return {"type": "object", "properties": {"x": schema}, "required": ["x"]}


def called(**fields):
    """Messages with a call whose function has these fields."""
    call = {"id": "c", "type": "function", "function": {"name": "f", **fields}}
    return [USER, {"role": "assistant", "tool_calls": [call]}]


SAMPLING = [
    ({"temperature": 101}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [1, "a"]}, "stop_token_ids[1]"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
    ({"logit_bias": {"the": 1}}, "logit_bias"),
    ({"logit_bias": {"Str": "x"}}, "logit_bias.Str"),
    ({"metadata": {"list": 5}}, "metadata.list"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"reasoning_budget": -1}, "reasoning_budget"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ({"reasoning_budget": 1, "thinking_token_budget": 2}, "reasoning_budget"),
    ({"reasoning_grace": -1}, "reasoning_grace"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]"),
    ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
    ({"temprature": 1}, "temprature"),
    ({"guided_json": {}}, "guided_json"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
]

TEMPLATE = [
    ({"chat_template_kwargs": {"reasoning_budget": -1}}, "chat_template_kwargs.reasoning_budget"),
    (
        {"chat_template_kwargs": {"thinking_token_budget": -1}},
        "chat_template_kwargs.thinking_token_budget",
    ),
    ({"chat_template_kwargs": {"low_effort": True}}, "chat_template_kwargs.low_effort"),
    ({"chat_template_kwargs": {"medium_effort": True}}, "chat_template_kwargs.medium_effort"),
    ({"chat_template_kwargs": {"enable_thinkin": True}}, "chat_template_kwargs.enable_thinkin"),
    ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking"),
    (
        {"chat_template_kwargs": {"low_effort": True, "enable_thinking": False}},
        "chat_template_kwargs.low_effort",
    ),
]

OWN = {
    CHAT: [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [USER, {"role": "assistant", "reasoning": 1}]}, "messages[1].reasoning"),
        (
            {"messages": [USER, {"role": "assistant", "reasoning_content": 1}]},
            "messages[1].reasoning_content",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": 1}]}, "messages[1].tool_calls"),
        ({"messages": called(name="")}, "messages[1].tool_calls[0].function.name"),
        ({"messages": called(name="a<b")}, "messages[1].tool_calls[0].function.name"),
        ({"messages": called(arguments="{")}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": called(arguments="[1]")}, "messages[1].tool_calls[0].function.arguments"),
        (
            {"messages": called(arguments='{"a": "\\ud800"}')},
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": called(arguments='{"a": ' + "1" * 5000 + "}")},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        (
            {"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": 3}]},
            "messages[1].tool_call_id",
        ),
        ({"messages": [{"role": "user", "content": "x " * 4096}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt_logprobs": 1000}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning_effort",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}],
             "chat_template_kwargs": {"budget_hint": 5}},
            "chat_template_kwargs.budget_hint",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "tools": [function()]}, "response_format"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [function(), {"type": "function"}]}, "tools[1].name"),
        ({"tools": [function(name="")]}, "tools[0].function.name"),
        ({"tools": [function(description=1)]}, "tools[0].function.description"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"properties": {"a>b": {}}})]},
         "tools[0].function.parameters.properties"),
        ({"tools": [function(parameters={"required": "a"})]},
         "tools[0].function.parameters.required"),
        ({"tools": [function(parameters={"required": ["a", "c>d"]})]},
         "tools[0].function.parameters.required[1]"),
        ({"tools": [function(), function()]}, "tools"),
        (
            {"tools": [function(name="g"), function(parameters=parameters(False))],
             "tool_choice": "required"},
            "tools[1].function.parameters.properties.x",
        ),
        (
            {"tools": [function(name="g"), function(parameters=parameters({"minLength": "x"}))],
             "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tools[1].function.parameters.properties.x",
        ),
        (
            {"tools": [function(parameters={**ANYTHING, "not": {"required": ["x"]}})],
             "tool_choice": "required"},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [function()],
             "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"functions": []}, "functions"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        *TEMPLATE,
    ],
    COMPLETIONS: [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "x" * 2_000_000}, "prompt"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 4096}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"logprobs": 1000}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"echo": True, "stream": True}, "echo"),
        ({"suffix": "y"}, "suffix"),
    ],
    RESPONSES: [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [USER, {"role": "critic", "content": "x"}]}, "input[1].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [USER, {"type": "reasoning", "content": [1]}]}, "input[1].content[0]"),
        ({"input": [USER, {"type": "reasoning", "summary": 1}]}, "input[1].summary"),
        ({"input": [USER, {"type": "function_call", "arguments": "{}"}]}, "input[1].name"),
        (
            {"input": [USER, {"type": "function_call", "name": "f", "arguments": "{"}]},
            "input[1].arguments",
        ),
        (
            {"input": [USER, {"type": "function_call", "name": "f", "call_id": 1}]},
            "input[1].call_id",
        ),
        ({"input": [USER, {"type": "function_call_output", "output": 1}]}, "input[1].output"),
        (
            {"input": [USER, {"type": "function_call_output", "output": "x", "call_id": 1}]},
            "input[1].call_id",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0]"),
        ({"input": "x " * 4096}, "input"),
        ({"input": "x" * 2_000_000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        (
            {"top_logprobs": 1000, "include": ["message.output_text.logprobs"]},
            "top_logprobs",
        ),
        ({"include": ["everything"]}, "include[0]"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        (
            {"reasoning": {"effort": "none"}, "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning.effort",
        ),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": 1}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
        ),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a<b"}]}, "tools[0].name"),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": parameters(False)}],
             "tool_choice": "required"},
            "tools[0].parameters.properties.x",
        ),
        ({"tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"background": True}, "background"),
        *TEMPLATE,
    ],
    TOKENIZE: [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "messages": []}, "prompt"),
        ({"prompt": "x", "tools": []}, "tools"),
        ({"prompt": "x" * 2_000_000}, "prompt"),
        ({"messages": [{"role": "x"}]}, "messages[0].role"),
        ({"messages": [USER], "tools": [{"name": 1}]}, "tools[0].name"),
        (
            {"messages": [USER], "chat_template_kwargs": {"low_effort": True}},
            "chat_template_kwargs.low_effort",
        ),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message"),
    ],
    DETOKENIZE: [
        ({}, "tokens"),
        ({"tokens": [1, -1]}, "tokens[1]"),
        ({"tokens": [1, "a"]}, "tokens[1]"),
    ],
}  # fmt: skip
CASES = [
    (path, body, param)
    for path, own in OWN.items()
    for body, param in (SAMPLING if path.startswith("/v1/") else []) + own
]


@pytest.mark.parametrize(("path", "body", "param"), CASES)
def test_a_bad_value_is_refused_by_the_client_s_name(served, path, body, param):
    answer = served.post(path, VALID[path] | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["param"] == param, error
    assert param in error["message"], error
    if path == RESPONSES:
        for name in ("max_tokens", "messages", "reasoning_effort"):
            assert name not in error["message"], error


@pytest.mark.parametrize(
    ("path", "field"),
    [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens")],
)
def test_a_second_field_of_an_error_has_the_client_s_name_too(served, path, field):
    answer = served.post(path, VALID[path] | {field: 5, "min_tokens": 6})
    said = f"min_tokens is 6; it must be at most {field} (5)"
    assert answer.json()["error"]["message"] == said


def test_items_are_counted_from_the_request_s_own(served):
    stored = served.post(RESPONSES, {"input": "Hi", "max_output_tokens": 2}).json()["id"]
    body = {"input": [{"role": "critic", "content": "x"}], "previous_response_id": stored}
    assert served.post(RESPONSES, body).json()["error"]["param"] == "input[0].role"
