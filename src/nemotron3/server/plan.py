"""What is asked of the model in a conversation, whichever endpoint it came by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron3.inference.requests import SamplingParams, StructuredOutput
from nemotron3.server.refusals import invalid
from nemotron3.server.tool_choice import ToolUse
from nemotron3.text import Tool


@dataclass(frozen=True, kw_only=True)
class ChatPlan:
    """Messages and tools for the template, parameters for the engine."""

    messages: Sequence[Any]
    options: Mapping[str, Any]
    """Keyword arguments of `prepare_chat`."""
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    is_single_call: bool = False
    source: str = "messages"
    """The field that holds the conversation, for errors."""
    max_tokens_name: str = "max_completion_tokens"
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the request calls the options of `prepare_chat`, where that is something else."""


def wanted_form(tools: ToolUse, *forms: StructuredOutput | None) -> StructuredOutput | None:
    """The one form that the answer is held to, from whatever fields ask for one."""
    given = [form for form in forms if form is not None]
    if not given:
        return tools.structured
    wanted, name = given[0], given[0].source
    if any(form != wanted for form in given):
        names = " and ".join(str(form.source) for form in given)
        raise invalid(f"{names} hold the answer to different forms; give one of them", name)
    if tools.listed:
        raise invalid(
            f"{name} holds the answer to a form in which no tool could be called; send "
            f"tool_choice: 'none', or leave one of them out",
            name,
        )
    return wanted


def json_form(kind: str, schema: Mapping[str, Any] | None, where: str) -> StructuredOutput | None:
    """OpenAI's `text`, `json_object` and `json_schema`."""
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput(kind="json_object", source=where)
    if schema is None:
        raise invalid(f"{where} is of type json_schema and has no schema", where)
    return StructuredOutput(kind="json_schema", value=schema, source=where)


def ending_with_call(params: SamplingParams, tools: ToolUse, tool_call_end: int) -> SamplingParams:
    """Take the end of a call for the end of the answer, where there may be one call."""
    if not tools.is_single:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, tool_call_end))
