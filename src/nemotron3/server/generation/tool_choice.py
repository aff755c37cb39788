"""Tool choice: which tools are listed in the prompt, and whether a call is enforced.

- `auto`: the tools are listed and the model decides.
- `none`: they are not listed, so the model cannot call them.
- `required`, or one function by name: a grammar enforces that a call follows the reasoning, of a
  function that exists, with every required argument and values of the right types.

With `parallel_tool_calls: false` the end of the first call is the end of the answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemotron3.inference.requests import SamplingParams, StructuredOutput
from nemotron3.server.http.errors import invalid_request
from nemotron3.text import Tool, parse_tools
from nemotron3.text.call_grammar import call_grammar


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Tools that are listed in the prompt, and the grammar of an enforced call."""

    listed: tuple[Tool, ...] = ()
    structured: StructuredOutput | None = None
    is_single: bool = False
    """Whether the answer ends with its first call; an enforced call ends by its grammar."""


def tool_use(
    tools: Sequence[Any] | None,
    choice: str | None,
    *,
    named: str | None = None,
    is_parallel: bool | None = None,
) -> ToolUse:
    """Read `tools`, `tool_choice` (a mode, or a function's name) and `parallel_tool_calls`."""
    parsed = parse_tools(tools)
    if len({tool.name for tool in parsed}) < len(parsed):
        raise invalid_request(
            "tools has two functions of one name; names tell calls apart", "tools"
        )
    if not parsed:
        if named is not None or choice == "required":
            raise invalid_request(
                "tool_choice asks for a call and there are no tools", "tool_choice"
            )
        return ToolUse()
    if choice == "none":
        return ToolUse()
    is_single = is_parallel is False
    if named is not None:
        chosen = [tool for tool in parsed if tool.name == named]
        if not chosen:
            known = ", ".join(tool.name for tool in parsed)
            raise invalid_request(f"tool_choice is {named!r}; the tools are {known}", "tool_choice")
        return ToolUse(listed=parsed, structured=_calls(chosen, is_single=True))
    if choice == "required":
        return ToolUse(listed=parsed, structured=_calls(parsed, is_single=is_single))
    return ToolUse(listed=parsed, is_single=is_single)


def ending_with_call(params: SamplingParams, tools: ToolUse, tool_call_end: int) -> SamplingParams:
    """Parameters with which an answer ends at the end of a call, if there may be only one."""
    if not tools.is_single:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, tool_call_end))


def _calls(tools: Iterable[Tool], *, is_single: bool) -> StructuredOutput:
    grammar = call_grammar(tools, is_single=is_single)
    return StructuredOutput(kind="grammar", value=grammar, source="tools")
