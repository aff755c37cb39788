"""From a body of /v1/responses to messages, tools and sampling parameters."""

from collections.abc import Mapping
from typing import Any

from nemotron3.inference.requests import StructuredOutput
from nemotron3.server.generation.prompts import ChatPlan
from nemotron3.server.generation.sampling import NO_DEFAULTS, sampling_params
from nemotron3.server.generation.structured_output import (
    json_structured_output,
    select_structured_output,
    structured_output,
)
from nemotron3.server.generation.thinking import resolve_thinking
from nemotron3.server.generation.token_ids import token_prefix, without_token_fields
from nemotron3.server.generation.tool_choice import ending_with_call, tool_use
from nemotron3.server.http.errors import invalid_request
from nemotron3.server.responses.body import LOGPROBS, NamedFunctionTool, ResponsesBody
from nemotron3.server.responses.items import Item, items_of, messages_of
from nemotron3.server.responses.store import ResponseStore


def conversation(body: ResponsesBody, store: ResponseStore) -> list[Item]:
    """All items of the conversation: those of the previous response, then those of `input`."""
    before: list[Item] = []
    if body.previous_response_id is not None:
        before = store.get(body.previous_response_id, "previous_response_id").items
    return [*before, *items_of(body.input)]


def plan_response(
    body: ResponsesBody,
    items: list[Item],
    tool_call_end: int,
    defaults: Mapping[str, Any] = NO_DEFAULTS,
) -> ChatPlan:
    """The plan of a body; fields that are not given have the model's defaults.

    `items` are those of `conversation`.
    """
    choice = body.tool_choice
    named = choice.name if isinstance(choice, NamedFunctionTool) else None
    word = None if isinstance(choice, NamedFunctionTool) else choice
    tools = tool_use(body.tools, word, named=named, is_parallel=body.parallel_tool_calls)
    thinking = resolve_thinking(
        body,
        body.chat_template_kwargs,
        body.reasoning.effort if body.reasoning is not None else None,
        effort_field="reasoning.effort",
    )
    with_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not with_logprobs:
        raise invalid_request(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid_request("stream_options is for streams; send stream: true", "stream_options")
    names = {
        **thinking.names,
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "logprobs": "top_logprobs",
    }
    structured = select_structured_output(
        tools, structured_output(body.structured_outputs), _text_format(body)
    )
    params = sampling_params(
        body,
        defaults,
        names=names,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if with_logprobs or body.returns_ids else None,
        reasoning_budget=thinking.budget,
        structured=structured,
    )
    num_stored = len(items) - len(items_of(body.input))
    messages = messages_of(items, body.instructions, num_stored=num_stored)
    return ChatPlan(
        messages=[without_token_fields(message) for message in messages],
        prefix=token_prefix(messages, body.required_prefix_token_ids),
        tools=tools.listed,
        options=thinking.template_options,
        params=ending_with_call(params, tools, tool_call_end),
        is_single_call=tools.is_single,
        names=names,
    )


def _text_format(body: ResponsesBody) -> StructuredOutput | None:
    wanted = body.text.format if body.text is not None else None
    if wanted is None:
        return None
    return json_structured_output(wanted.type, wanted.schema_, "text.format")
