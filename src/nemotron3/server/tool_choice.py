"""Which tools the model sees, and how a call is made certain where one is asked for.

- `auto`: the tools are listed and the model decides.
- `none`: they are not listed, so it cannot call them.
- `required`, or one by name: what follows the reasoning is held to a grammar of calls, so that it
  is a call, of a function that exists, with every required argument and values of the right types.

One call at a time (`parallel_tool_calls: false`) is the end of the first call taken for the end of
the answer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from nemotron3.inference.requests import StructuredOutput
from nemotron3.server.refusals import invalid
from nemotron3.text import Tool, parse_tools
from nemotron3.text.arguments import is_plain_text


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What a request may call: the tools that are listed, and the grammar of a certain call."""

    listed: tuple[Tool, ...] = ()
    structured: StructuredOutput | None = None
    is_single: bool = False
    """Whether the first call is the last, without a grammar that says so."""


def tool_use(
    tools: Sequence[Any] | None,
    choice: str | None,
    *,
    named: str | None = None,
    is_parallel: bool | None = None,
) -> ToolUse:
    """Read `tools`, `tool_choice` (a word, or a function's name) and `parallel_tool_calls`."""
    parsed = parse_tools(tools)
    if len({tool.name for tool in parsed}) < len(parsed):
        raise invalid("tools has two functions of one name; names tell calls apart", "tools")
    if not parsed:
        if named is not None or choice == "required":
            raise invalid("tool_choice asks for a call and there are no tools", "tool_choice")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    is_single = is_parallel is False
    if named is not None:
        chosen = [tool for tool in parsed if tool.name == named]
        if not chosen:
            known = ", ".join(tool.name for tool in parsed)
            raise invalid(f"tool_choice is {named!r}; the tools are {known}", "tool_choice")
        return ToolUse(listed=parsed, structured=_calls(chosen, is_single=True))
    if choice == "required":
        return ToolUse(listed=parsed, structured=_calls(parsed, is_single=is_single))
    return ToolUse(listed=parsed, is_single=is_single)


def _calls(tools: Iterable[Tool], *, is_single: bool) -> StructuredOutput:
    grammar = call_grammar(tools, is_single=is_single)
    return StructuredOutput(kind="grammar", value=grammar, source="tools")


def call_grammar(tools: Iterable[Tool], *, is_single: bool) -> str:
    r"""A Lark grammar of calls in the family's format, for llguidance.

    Arguments come in the order of the schema, the required ones always. A text ends at the first
    `\n</parameter>`, as it does for whoever reads the call; every other value is JSON by its
    schema. A function without a schema takes any arguments, as text. The line end that the template
    writes after a call may come before the end: a model that has learned it would otherwise have to
    go on with another call.
    """
    rules: list[str] = []
    calls: list[str] = []
    for i, tool in enumerate(tools):
        calls.append(f"call_{i}")
        rules += _call_rules(f"call_{i}", tool)
    repeated = "call" if is_single else 'call ("\\n" call)*'
    lines = [
        f'start: {repeated} "\\n"?',
        'call: <tool_call> "\\n" function "\\n" </tool_call>',
        f"function: {' | '.join(calls)}",
        *rules,
        r'text[suffix="\n</parameter>"]: /(?s:.*)/',
    ]
    return "\n".join(lines) + "\n"


def _call_rules(rule: str, tool: Tool) -> list[str]:
    head, tail = json.dumps(f"<function={tool.name}>\n"), json.dumps("</function>")
    properties = (tool.parameters or {}).get("properties")
    required: Any = (tool.parameters or {}).get("required") or ()
    if not isinstance(properties, Mapping) and not required:
        any_argument = r'"<parameter=" /[^<>\n]{1,256}/ ">\n" text "\n"'
        return [f"{rule}: {head} {rule}_any* {tail}", f"{rule}_any: {any_argument}"]
    parts: list[str] = []
    rules: list[str] = []
    described = cast(Mapping[str, Any], properties or {})
    for i, name in enumerate([*described, *(r for r in required if r not in described)]):
        parts.append(f"{rule}_{i}" + ("" if name in required else "?"))
        opening = json.dumps(f"<parameter={name}>\n")
        schema = tool.parameter_schema(name)
        if schema is None or is_plain_text(schema, root=tool.parameters):
            value = _text_rule(schema)
        else:
            value = f'{rule}_{i}_value "\\n</parameter>\\n"'
            rules.append(f"{rule}_{i}_value: %json {_closed(schema, tool.parameters)}")
        rules.append(f"{rule}_{i}: {opening} {value}")
    return [f"{rule}: {' '.join([head, *parts, tail])}", *rules]


def _text_rule(schema: Mapping[str, Any] | None) -> str:
    choices = (schema or {}).get("enum")
    if not isinstance(choices, Sequence):
        return 'text "\\n"'
    spelled = " | ".join(json.dumps(choice) for choice in cast(Sequence[Any], choices))
    return f'({spelled}) "\\n</parameter>\\n"'


def _closed(schema: Mapping[str, Any] | None, parameters: Mapping[str, Any] | None) -> str:
    """A parameter's schema by itself, with the definitions that it may refer to."""
    definitions = {
        key: (parameters or {})[key]
        for key in ("$defs", "definitions")
        if key in (parameters or {})
    }
    return json.dumps({**definitions, **(schema or {})})
