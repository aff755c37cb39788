"""From a body of /v1/chat/completions to messages, tools and sampling parameters."""

from collections.abc import Mapping
from typing import Any

from nemotron3.inference.requests import StructuredOutput
from nemotron3.server.chat.body import ChatBody, NamedTool
from nemotron3.server.generation.prompts import ChatPlan
from nemotron3.server.generation.sampling import NO_DEFAULTS, one_of, sampling_params
from nemotron3.server.generation.structured_output import (
    json_structured_output,
    select_structured_output,
    structured_output,
)
from nemotron3.server.generation.thinking import resolve_thinking
from nemotron3.server.generation.token_ids import token_prefix, without_token_fields
from nemotron3.server.generation.tool_choice import ending_with_call, tool_use
from nemotron3.server.http.errors import invalid_request


def plan_chat(
    body: ChatBody, tool_call_end: int, defaults: Mapping[str, Any] = NO_DEFAULTS
) -> ChatPlan:
    """The plan of a body; fields that are not given have the model's defaults."""
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    word = None if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    tools = tool_use(body.tools, word, named=named, is_parallel=body.parallel_tool_calls)
    thinking = resolve_thinking(body, body.chat_template_kwargs, body.reasoning_effort)
    limit, max_tokens = one_of(
        {"max_completion_tokens": body.max_completion_tokens, "max_tokens": body.max_tokens}
    )
    names = {**thinking.names, "max_tokens": limit, "logprobs": "top_logprobs"}
    structured = select_structured_output(
        tools, structured_output(body.structured_outputs), _response_format(body)
    )
    params = sampling_params(
        body,
        defaults,
        names=names,
        n=body.n,
        max_tokens=max_tokens,
        logprobs=_logprobs(body),
        prompt_logprobs=body.prompt_logprobs,
        reasoning_budget=thinking.budget,
        structured=structured,
    )
    _assert_stream_options(body)
    ends = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
    }
    said = {name: value for name, value in ends.items() if value is not None}
    return ChatPlan(
        messages=[without_token_fields(message) for message in body.messages],
        prefix=token_prefix(body.messages, body.required_prefix_token_ids),
        tools=tools.listed,
        options={**thinking.template_options, **said},
        params=ending_with_call(params, tools, tool_call_end),
        is_single_call=tools.is_single,
        names=names,
    )


def _response_format(body: ChatBody) -> StructuredOutput | None:
    wanted = body.response_format
    if wanted is None:
        return None
    schema = wanted.json_schema.schema_ if wanted.json_schema is not None else None
    return json_structured_output(wanted.type, schema, "response_format")


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.returns_ids and not body.top_logprobs:
        return 0
    if body.top_logprobs:
        raise invalid_request("top_logprobs needs logprobs: true", "top_logprobs")
    return None


def _assert_stream_options(body: ChatBody) -> None:
    options = body.stream_options
    if options is not None and not body.stream:
        raise invalid_request("stream_options is for streams; send stream: true", "stream_options")
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise invalid_request(
            "stream_options.continuous_usage_stats needs include_usage: true",
            "stream_options.continuous_usage_stats",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise invalid_request(
            "prompt_logprobs is not part of a stream; leave one out", "prompt_logprobs"
        )
