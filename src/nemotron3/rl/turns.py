"""A turn of the policy as verifiers and templates read it."""

import json
from typing import Any, cast

from nemotron3.inference.output_processor import CompletionOutput
from nemotron3.text import AssistantMessage, ToolCall


def turn_of(output: CompletionOutput) -> AssistantMessage:
    """The turn that the engine has sampled; a call that cannot be read has no arguments."""
    return AssistantMessage(
        content=output.content,
        reasoning=output.reasoning or None,
        tool_calls=tuple(
            ToolCall(name=call.name, arguments=_arguments(call.arguments), id=f"call_{place}")
            for place, call in enumerate(output.tool_calls)
        ),
    )


def _arguments(text: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}
