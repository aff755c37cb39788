"""How tools are listed in the system turn, and how a call of one is written.

The wording is that of the published models' training; any other wording would be another prompt. It
is defined here once, as data, for the renderer and for the Jinja export.

Values are written as the published template writes them: objects and lists as JSON, everything
else as Python's `str` (`True`, `None`, `0.5`). There is no escaping: a text argument that holds
`</parameter>`, a line break and `<parameter=` would be read as two arguments by any parser.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from nemotron3.text.messages import Json, Tool, ToolCall

HEADING = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
INSTRUCTIONS = (
    "\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n"
    "<function=example_function_name>\n"
    "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\n"
    "This is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n"
    "</function>\n"
    "</tool_call>\n\n"
    "<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block "
    "must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the "
    "function call, but NOT after\n"
    "- If there is no function call available, answer the question like normal with your current "
    "knowledge and do not tell the user about function calls\n"
    "</IMPORTANT>"
)
TOOL_KEYS = ("type", "name", "description", "parameters")
SCHEMA_KEYS = ("type", "properties", "required")
PARAMETER_KEYS = ("name", "type", "description", "enum")


def describe_tool(tool: Tool) -> str:
    """A tool as XML, from `<function>` to `</function>`, with a line end before it."""
    lines = ["<function>", f"<name>{tool.name}</name>"]
    if tool.description is not None:
        lines.append(f"<description>{tool.description.strip()}</description>")
    lines.append("<parameters>")
    schema = tool.parameters or {}
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for name, described in cast(Mapping[str, Json], properties).items():
            lines += _describe_parameter(name, described)
    lines += _other_keys(schema, SCHEMA_KEYS)
    if "required" in schema:
        lines.append(f"<required>{to_json(schema['required'])}</required>")
    lines.append("</parameters>")
    lines += _other_keys(tool.extra, TOOL_KEYS)
    lines.append("</function>")
    return "".join("\n" + line for line in lines)


def write_argument(value: Json) -> str:
    """An argument's value as it is written between `<parameter=…>` and `</parameter>`."""
    return to_json(value) if _is_container(value) else str(value)


def write_call(call: ToolCall) -> str:
    """The text between `<tool_call>` and `</tool_call>`."""
    arguments = "".join(
        f"<parameter={name}>\n{write_argument(value)}\n</parameter>\n"
        for name, value in call.arguments.items()
    )
    return f"\n<function={call.name}>\n{arguments}</function>\n"


def to_json(value: Json) -> str:
    """JSON as transformers' `tojson` writes it in templates: without HTML or ASCII escapes."""
    return json.dumps(value, ensure_ascii=False)


def _describe_parameter(name: str, described: Json) -> list[str]:
    lines = ["<parameter>", f"<name>{name}</name>"]
    if isinstance(described, Mapping):
        schema = cast(Mapping[str, Any], described)
        if "type" in schema:
            lines.append(f"<type>{schema['type']}</type>")
        if "description" in schema:
            lines.append(f"<description>{str(schema['description']).strip()}</description>")
        if "enum" in schema:
            lines.append(f"<enum>{to_json(schema['enum'])}</enum>")
        lines += _other_keys(schema, PARAMETER_KEYS)
    lines.append("</parameter>")
    return lines


def _other_keys(fields: Mapping[str, Json], named: Sequence[str]) -> list[str]:
    return [
        f"<{key}>{write_argument(value)}</{key}>"
        for key, value in fields.items()
        if key not in named
    ]


def _is_container(value: Json) -> bool:
    return isinstance(value, Mapping | list | tuple)
