"""What a policy did with a task, as plain data, and the same as items of NeMo Gym.

A `TaskResponse` holds the messages that follow the prompt: turns of the assistant (reasoning,
content, tool calls), answers of tools, and what a user said in between. Verifiers read messages
and no tokens, so that one verifier serves our engine, recorded answers and other people's agents.

NeMo Gym writes the same as a list of items of OpenAI's Responses API, in which a turn of the
assistant is several items: its reasoning, its words, each call. `to_items` takes turns apart, and
`from_items` joins them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from nemotron3.errors import DataError
from nemotron3.text import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    parse_messages,
)

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskResponse:
    """The messages after the prompt; `is_complete` unless a limit of tokens or turns cut it."""

    messages: tuple[Message, ...]
    is_complete: bool = True

    @classmethod
    def of(cls, *messages: Message | Mapping[str, Any], is_complete: bool = True) -> "TaskResponse":
        """A response of messages, typed or as OpenAI's dictionaries."""
        return cls(messages=parse_messages(messages), is_complete=is_complete)

    @property
    def turns(self) -> tuple[AssistantMessage, ...]:
        """The assistant's turns."""
        return tuple(m for m in self.messages if isinstance(m, AssistantMessage))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Every call of every turn, in order."""
        return tuple(call for turn in self.turns for call in turn.tool_calls)

    @property
    def answer(self) -> str:
        """The content of the last turn without white space around it; "" where there is none.

        There is none in a response that was cut, or that ends with a call, a tool's answer or a
        user's turn. Reasoning is no answer.
        """
        last = self.messages[-1] if self.messages else None
        if not self.is_complete or not isinstance(last, AssistantMessage) or last.tool_calls:
            return ""
        return last.content.strip()

    def to_gym(self) -> dict[str, Any]:
        """The fields of a response of NeMo Gym that verifiers read: `output` and `status`."""
        return {
            "output": to_items(self.messages),
            "status": "completed" if self.is_complete else "incomplete",
        }

    @classmethod
    def from_gym(cls, response: Mapping[str, Any]) -> "TaskResponse":
        """Read a response of NeMo Gym; raises `DataError` with the place of what is wrong."""
        output = response.get("output")
        if not isinstance(output, list):
            raise DataError("response.output is no list of items; give those of a response")
        items = cast(list[Any], output)
        is_cut = response.get("status") == "incomplete" or bool(response.get("incomplete_details"))
        return cls(messages=from_items(items, "response.output"), is_complete=not is_cut)


def to_dict(message: Message) -> dict[str, Any]:
    """A message as OpenAI's chat completions write it; `parse_messages` reads it back."""
    match message:
        case SystemMessage():
            return {"role": "system", "content": message.content}
        case UserMessage():
            return {"role": "user", "content": message.content}
        case ToolMessage():
            named = {} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id}
            return {"role": "tool", **named, "content": message.content}
        case AssistantMessage():
            written: dict[str, Any] = {"role": "assistant", "content": message.content}
            if message.reasoning is not None:
                written["reasoning_content"] = message.reasoning
            if message.tool_calls:
                written["tool_calls"] = [_call_dict(call) for call in message.tool_calls]
            return written


def to_items(messages: Iterable[Message]) -> list[Item]:
    """Messages as items of OpenAI's Responses API.

    A call without an id is given one by its place, because items join calls and their outputs by
    it; an output without an id is that of the first call that has no output yet.
    """
    items: list[Item] = []
    unanswered: list[str] = []
    for message in messages:
        if isinstance(message, AssistantMessage):
            unanswered = _add_turn(items, message)
        elif isinstance(message, ToolMessage):
            call_id = message.tool_call_id or (unanswered[0] if unanswered else "")
            if call_id in unanswered:
                unanswered.remove(call_id)
            items.append(
                {"type": "function_call_output", "call_id": call_id, "output": message.content}
            )
        else:
            role = "user" if isinstance(message, UserMessage) else "system"
            items.append({"type": "message", "role": role, "content": message.content})
    return items


def from_items(items: Sequence[Any], where: str = "items") -> tuple[Message, ...]:
    """Items as messages, the neighbouring items of one turn joined.

    Raises `DataError` with the place of what is wrong; `where` names the list.
    """
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's turn that items are being joined to
    for i, item in enumerate(items):
        at = f"{where}[{i}]"
        if not isinstance(item, Mapping):
            raise DataError(f"{at} is of type {type(item).__name__}, an object was expected")
        fields = cast(Mapping[str, Any], item)
        kind = fields.get("type", "message")
        if kind == "reasoning":
            turn = {"role": "assistant", "reasoning_content": _reasoning(fields, at)}
            messages.append(turn)
        elif kind == "function_call":
            if turn is None:
                turn = {"role": "assistant"}
                messages.append(turn)
            turn.setdefault("tool_calls", []).append(_call(fields))
        elif kind == "function_call_output":
            turn = None
            text = _text(fields.get("output"), f"{at}.output")
            messages.append(
                {"role": "tool", "tool_call_id": fields.get("call_id"), "content": text}
            )
        elif kind == "message":
            text = _text(fields.get("content"), f"{at}.content")
            if fields.get("role") != "assistant":
                turn = None
                messages.append({"role": fields.get("role"), "content": text})
            elif turn is None or "content" in turn or "tool_calls" in turn:
                turn = {"role": "assistant", "content": text}
                messages.append(turn)
            else:
                turn["content"] = text
        else:
            raise DataError(
                f"{at}.type is {kind!r}; the items are message, reasoning, function_call, "
                "function_call_output"
            )
    return parse_messages(messages)


def _add_turn(items: list[Item], turn: AssistantMessage) -> list[str]:
    """Write one turn of the assistant; the ids of its calls."""
    if turn.reasoning is not None:
        text = {"type": "summary_text", "text": turn.reasoning}
        items.append({"type": "reasoning", "summary": [text]})
    if turn.content or not turn.tool_calls:
        text = {"type": "output_text", "text": turn.content, "annotations": []}
        items.append({"type": "message", "role": "assistant", "content": [text]})
    ids: list[str] = []
    for call in turn.tool_calls:
        ids.append(call.id or f"call_{len(items)}")
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        items.append(
            {
                "type": "function_call",
                "call_id": ids[-1],
                "name": call.name,
                "arguments": arguments,
            }
        )
    return ids


def _call_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": dict(call.arguments)}
    named = {} if call.id is None else {"id": call.id}
    return {"type": "function", **named, "function": function}


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: item.get(key) for key in ("name", "arguments")}
    return {"type": "function", "id": item.get("call_id"), "function": function}


def _reasoning(item: Mapping[str, Any], at: str) -> str:
    if item.get("content"):
        return _text(item["content"], f"{at}.content")
    return _text(item.get("summary") or "", f"{at}.summary")


def _text(value: Any, at: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{at} is no text and no list of parts; give one of them")
    texts: list[str] = []
    for i, part in enumerate(cast(list[Any], value)):
        text: Any = cast(Mapping[str, Any], part).get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise DataError(f"{at}[{i}] is no part with a text; only texts can be read")
        texts.append(text)
    return "".join(texts)
