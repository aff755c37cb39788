"""What is asked of the model in a conversation, whichever endpoint it came by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron3.inference.requests import SamplingParams, StructuredOutput
from nemotron3.server.errors import invalid_request
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


def select_structured_output(
    tools: ToolUse, *outputs: StructuredOutput | None
) -> StructuredOutput | None:
    """The one structured output that is asked for, from whatever fields ask for one."""
    given = [output for output in outputs if output is not None]
    if not given:
        return tools.structured
    wanted, name = given[0], given[0].source
    if any(output != wanted for output in given):
        names = " and ".join(str(output.source) for output in given)
        raise invalid_request(f"{names} hold the answer to different forms; give one of them", name)
    if tools.listed:
        raise invalid_request(
            f"{name} holds the answer to a form in which no tool could be called; send "
            f"tool_choice: 'none', or leave one of them out",
            name,
        )
    return wanted


def json_structured_output(
    kind: str, schema: Mapping[str, Any] | None, where: str
) -> StructuredOutput | None:
    """OpenAI's `text`, `json_object` and `json_schema`."""
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput(kind="json_object", source=where)
    if schema is None:
        raise invalid_request(f"{where} is of type json_schema and has no schema", where)
    return StructuredOutput(kind="json_schema", value=schema, source=where)


def ending_with_call(params: SamplingParams, tools: ToolUse, tool_call_end: int) -> SamplingParams:
    """Take the end of a call for the end of the answer, where there may be one call."""
    if not tools.is_single:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, tool_call_end))
