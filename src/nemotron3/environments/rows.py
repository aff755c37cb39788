"""A task as a row: NeMo Gym's JSONL format, one JSON object for each task.

    {"responses_create_params": {"input": [...], "tools": [...], "parallel_tool_calls": false},
     "agent_ref": {"type": "responses_api_agents", "name": "math"},
     ...fields of the environment, such as "expected_answer"}

The prompt and the tools are what a policy sees; the other fields are for the environment alone.

Whether a task is held out is a property of its prompt: a hash of its messages decides. So training
and held-out tasks are disjoint for all seeds and difficulties, and a row that was written to a
file years ago is still on the same side.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, cast

from nemotron3.environments.response import from_items, to_items
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import Message, Tool, UserMessage, parse_tools

Row = dict[str, Any]

HELD_OUT_ONE_IN = 8
"""One prompt in so many is held out."""


class Split(StrEnum):
    """The two sides on which a task can be."""

    TRAIN = "train"
    HELD_OUT = "held_out"

    @classmethod
    def named(cls, name: "str | Split") -> "Split":
        """The split of a name; raises `ConfigError` for another one."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(f"no split {name!r}; there are {', '.join(cls)}") from None


def make_row(
    environment: str,
    prompt: str | Sequence[Message],
    /,
    *,
    tools: Sequence[Tool] = (),
    parallel_tool_calls: bool = False,
    **fields: Any,
) -> Row:
    """A row for the environment of that name; a prompt that is a text is what the user says."""
    messages = [UserMessage(content=prompt)] if isinstance(prompt, str) else prompt
    return {
        "responses_create_params": {
            "input": to_items(messages),
            "tools": [_tool_dict(tool) for tool in tools],
            "parallel_tool_calls": parallel_tool_calls,
        },
        "agent_ref": {"type": "responses_api_agents", "name": environment},
        **fields,
    }


def prompt_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages that a policy answers; raises `DataError` with the place of what is wrong."""
    given: Any = _params(row).get("input")
    if isinstance(given, str):
        return (UserMessage(content=given),)
    if not isinstance(given, list) or not given:
        raise DataError("responses_create_params.input is no text and no list of items")
    return from_items(cast(list[Any], given), "responses_create_params.input")


def prompt_text(row: Mapping[str, Any]) -> str:
    """The contents of the prompt's messages, one after the other."""
    return "\n".join(message.content for message in prompt_of(row))


def tools_of(row: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The tools that a policy may call; raises `DataError` for one that cannot be read.

    Whether a tool is `strict` is for OpenAI's servers: NeMo Gym requires it in rows, and leaves it
    out of what a policy reads.
    """
    tools = parse_tools(_params(row).get("tools"))
    return tuple(
        replace(tool, extra={k: v for k, v in tool.extra.items() if k != "strict"})
        for tool in tools
    )


def environment_of(row: Mapping[str, Any]) -> str:
    """The name of the environment that a row is for."""
    reference: Any = row.get("agent_ref")
    name: Any = cast(Any, reference).get("name") if isinstance(reference, Mapping) else None
    if not isinstance(name, str):
        raise DataError("the row has no agent_ref.name; it says which environment verifies the row")
    return name


def field_of(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of the environment; raises `DataError` where it is missing or of another type."""
    value = row.get(name)
    is_right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if name not in row or not is_right:
        found = f"of type {type(value).__name__}" if name in row else "missing"
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        raise DataError(f"the row's {name} is {found}; {wanted} was expected")
    return value


def split_of(row: Mapping[str, Any]) -> Split:
    """The side on which a task is, by its prompt alone."""
    said = json.dumps([[type(m).__name__, m.content] for m in prompt_of(row)])
    digest = hashlib.sha256(said.encode()).digest()
    is_held_out = int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0
    return Split.HELD_OUT if is_held_out else Split.TRAIN


def _params(row: Mapping[str, Any]) -> Mapping[str, Any]:
    params = row.get("responses_create_params")
    if not isinstance(params, Mapping):
        raise DataError("the row has no responses_create_params; they hold the prompt and tools")
    return cast(Mapping[str, Any], params)


def _tool_dict(tool: Tool) -> dict[str, Any]:
    return {
        **tool.extra,
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": None if tool.parameters is None else dict(tool.parameters),
    }
