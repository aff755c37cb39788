"""The types of a conversation: four kinds of message, tool calls, tools.

The wire format is OpenAI's: dictionaries with `role` and `content`. `parse_messages` and
`parse_tools` read them once, on input; after that a conversation is well formed: contents are
strings, arguments are objects, a tool's answer follows a message. An invalid message is an error
that names its place (`messages[3].tool_calls[0].function.arguments`), because silently dropping a
message would change the answer without an explanation.

These are equivalent: `reasoning` and `reasoning_content`; a text and a list of text parts; the
roles `developer` and `system`; arguments as an object and as JSON text. Images and audio are
refused: the models read text only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nemotron3.errors import DataError

MAX_NAME = 256
"""Most characters in the name of a function or a parameter; OpenAI allows 64."""

Json = Any
"""A JSON value: None, bool, int, float, str, a list or a mapping with string keys."""


@dataclass(frozen=True, kw_only=True)
class SystemMessage:
    """Instructions to the model."""

    content: str


@dataclass(frozen=True, kw_only=True)
class UserMessage:
    """A message of the user."""

    content: str


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a function, with its arguments as an object."""

    name: str
    arguments: Mapping[str, Json] = field(default_factory=dict[str, Json])
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class AssistantMessage:
    """A message of the model: its reasoning, its answer, and its function calls.

    `is_trained` and `is_reasoning_cut` affect training only. A message that is not trained is
    context. If the reasoning was cut to teach a budget, its `</think>` is not a target, or the
    model would learn to stop early.
    """

    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    is_trained: bool = True
    is_reasoning_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class ToolMessage:
    """The answer of a function."""

    content: str
    tool_call_id: str | None = None


Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema of type object.

    `extra` holds all other fields of the description (`strict`, `returns`, …), which the family's
    template lists, too.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Json] | None = None
    extra: Mapping[str, Json] = field(default_factory=dict[str, Json])
    source: str = field(default="tools", compare=False)
    """The place of the tool in the request, for errors: `tools[0].function`."""


def parse_messages(messages: Sequence[Any]) -> tuple[Message, ...]:
    """Read OpenAI-style dictionaries; typed messages are returned unchanged.

    Raises `DataError` with the place of the mistake.
    """
    if not _is_list(messages):
        raise DataError(f"is {_kind(messages)}, a list of messages was expected", field="messages")
    parsed = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    start = 1 if parsed and isinstance(parsed[0], SystemMessage) else 0
    if len(parsed) > start and isinstance(parsed[start], ToolMessage):
        raise DataError(
            "is a tool's answer and nothing was asked before it; "
            "a message of the user or of the assistant must come first",
            field=f"messages[{start}]",
        )
    return parsed


def parse_tools(tools: Sequence[Any] | None) -> tuple[Tool, ...]:
    """Read OpenAI-style tools, with or without the `{"type": "function"}` around them.

    Raises `DataError` with the place of the mistake.
    """
    if tools is None:
        return ()
    if not _is_list(tools):
        raise DataError(f"is {_kind(tools)}, a list of tools was expected", field="tools")
    return tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def _message(value: Any, where: str) -> Message:
    if isinstance(value, SystemMessage | UserMessage | AssistantMessage | ToolMessage):
        return value
    message = _object(value, where)
    role = message.get("role")
    if role in ("system", "developer"):
        return SystemMessage(content=_content(message, where))
    if role == "user":
        return UserMessage(content=_content(message, where))
    if role == "tool":
        return ToolMessage(
            content=_content(message, where),
            tool_call_id=_optional_text(message.get("tool_call_id"), f"{where}.tool_call_id"),
        )
    if role == "assistant":
        return _assistant(message, where)
    raise DataError(
        f"is {role!r}; the roles are system, developer, user, assistant, tool",
        field=f"{where}.role",
    )


def _assistant(message: Mapping[str, Any], where: str) -> AssistantMessage:
    calls = message.get("tool_calls") or ()
    if not _is_list(calls):
        raise DataError(f"is {_kind(calls)}, a list was expected", field=f"{where}.tool_calls")
    key = "reasoning" if message.get("reasoning_content") is None else "reasoning_content"
    content = message.get("content")
    return AssistantMessage(
        content="" if content is None else _content(message, where),
        reasoning=_optional_text(message.get(key), f"{where}.{key}"),
        tool_calls=tuple(
            parse_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ),
        is_trained=_flag(message, "is_trained", where, default=True),
        is_reasoning_cut=_flag(message, "is_reasoning_cut", where, default=False),
    )


def parse_call(value: Any, where: str) -> ToolCall:
    """Read one call of a message, with or without the `"function"` around name and arguments.

    Raises `DataError` with the place of the mistake, which begins with `where`.
    """
    if isinstance(value, ToolCall):
        return value
    outer = _object(value, where)
    inner = "function" in outer
    call = _object(outer["function"], f"{where}.function") if inner else outer
    at = f"{where}.function" if inner else where
    arguments: Any = call.get("arguments") or "{}"
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{at}.arguments")
    return ToolCall(
        name=_name(call, at),
        arguments=_object(arguments, f"{at}.arguments"),
        id=_optional_text(outer.get("id"), f"{where}.id"),
    )


def _from_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON ({error.msg} at character {error.pos}); "
            f"give an object, or the JSON text of one",
            field=where,
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            "is JSON with half of a surrogate pair, which is no Unicode; write both halves",
            field=where,
        ) from error
    except RecursionError as error:
        raise DataError("is nested too deep; write it flatter", field=where) from error
    except ValueError as error:  # valid JSON with more digits than Python converts
        raise DataError("holds a number of too many digits; write fewer", field=where) from error
    return value


def _tool(value: Any, where: str) -> Tool:
    if isinstance(value, Tool):
        return value
    outer = _object(value, where)
    inner = "function" in outer
    tool = _object(outer["function"], f"{where}.function") if inner else outer
    at = f"{where}.function" if inner else where
    kind = outer.get("type", "function")
    if kind != "function":
        raise DataError(f"is {kind!r}; only functions can be offered", field=f"{where}.type")
    parameters = tool.get("parameters")
    if isinstance(parameters, Mapping):
        described = cast(Mapping[str, Any], parameters)
        properties, required = described.get("properties"), described.get("required")
        for name in cast(Mapping[str, Any], properties) if isinstance(properties, Mapping) else ():
            _assert_writable(name, f"{at}.parameters.properties")
        if required is not None and not _is_list(required):
            raise DataError(
                f"is {_kind(required)}; give a list of names", field=f"{at}.parameters.required"
            )
        for i, name in enumerate(cast(Sequence[Any], required or ())):
            _assert_writable(name, f"{at}.parameters.required[{i}]")
    named = ("type", "name", "description", "parameters")
    return Tool(
        name=_name(tool, at),
        description=_optional_text(tool.get("description"), f"{at}.description"),
        parameters=None if parameters is None else _object(parameters, f"{at}.parameters"),
        extra={key: field for key, field in tool.items() if key not in named},
        source=at,
    )


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise DataError(
            f"is {_kind(content)}, a text or a list of text parts was expected",
            field=f"{where}.content",
        )
    texts: list[str] = []
    for i, part in enumerate(cast(Sequence[Any], content)):
        at = f"{where}.content[{i}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        fields = _object(part, at)
        if fields.get("type") not in ("text", "input_text", "output_text"):
            raise DataError(
                f"is {fields.get('type')!r}; only text parts can be read", field=f"{at}.type"
            )
        text = fields.get("text")
        if not isinstance(text, str):
            raise DataError(f"is {_kind(text)}, a text was expected", field=f"{at}.text")
        texts.append(text)
    return "".join(texts)


def _name(fields: Mapping[str, Any], where: str) -> str:
    name = fields.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"is {name!r}, the name of a function was expected", field=f"{where}.name")
    _assert_writable(name, f"{where}.name")
    return name


def _assert_writable(name: Any, where: str) -> None:
    """Refuse a name with which a call could not be read back."""
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"is {name!r}; a name is a text that is not blank", field=where)
    if any(character in name for character in "<>\n"):
        raise DataError(f"is {name!r}; a name holds no '<', '>' or line end", field=where)
    if len(name) > MAX_NAME:
        raise DataError(f"has {len(name)} characters; a name has {MAX_NAME} at most", field=where)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"is {_kind(value)}, an object was expected", field=where)
    return cast(Mapping[str, Any], value)


def _optional_text(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"is {_kind(value)}, a text was expected", field=where)


def _flag(fields: Mapping[str, Any], key: str, where: str, *, default: bool) -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise DataError(f"is {_kind(value)}, true or false was expected", field=f"{where}.{key}")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
