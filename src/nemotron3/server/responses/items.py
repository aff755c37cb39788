"""Items of /v1/responses to messages, and an answer to items.

In a conversation of items an assistant's turn is several: its reasoning, its words, each call.
The template knows one message with all three, so neighbours of these kinds are joined.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from nemotron3.errors import DataError
from nemotron3.inference.output_processor import CompletionOutput
from nemotron3.server.generation.logprobs import chat_logprobs
from nemotron3.server.generation.serving import new_id
from nemotron3.text import Tokenizer

Item = dict[str, Any]

_PLAIN = ("user", "system", "developer")


def items_of(given: str | Sequence[Item]) -> list[Item]:
    """The input as items; a text is what the user says."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return [dict(item) for item in given]


def messages_of(items: Iterable[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation as the chat template takes it.

    Raises `DataError` with the place of what is wrong.
    """
    turns = _Turns()
    if instructions is not None:
        turns.say({"role": "system", "content": instructions})
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        match kind:
            case "message":
                turns.add_message(item, where)
            case "reasoning":
                turns.add_reasoning(_reasoning(item, where))
            case "function_call":
                turns.add_call(item)
            case "function_call_output":
                text = _text(item.get("output"), f"{where}.output")
                said = {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
                turns.say(said)
            case _:
                raise DataError(
                    f"{where}.type is {kind!r}; the items are message, reasoning, function_call, "
                    f"function_call_output"
                )
    return turns.end()


class _Turns:
    """Messages so far, and the assistant's turn that its items are being joined to."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] = {}

    def say(self, message: dict[str, Any]) -> None:
        """Take a message of anyone but the assistant."""
        self.end()
        self._messages.append(message)

    def add_message(self, item: Item, where: str) -> None:
        """Take an item with a role."""
        role = item.get("role")
        text = _text(item.get("content"), f"{where}.content")
        if role == "assistant":
            if "content" in self._turn or "tool_calls" in self._turn:
                self.end()
            self._turn["content"] = text
        elif role in _PLAIN:
            self.say({"role": role, "content": text})
        else:
            raise DataError(
                f"{where}.role is {role!r}; the roles are user, assistant, system, developer"
            )

    def add_reasoning(self, text: str) -> None:
        """Take the assistant's reasoning, with which a turn begins."""
        self.end()
        self._turn["reasoning_content"] = text

    def add_call(self, item: Item) -> None:
        """Take one of the assistant's calls."""
        function = {key: item.get(key) for key in ("name", "arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        self._turn.setdefault("tool_calls", []).append(call)

    def end(self) -> list[dict[str, Any]]:
        """End the assistant's turn; all messages."""
        if self._turn:
            self._messages.append({"role": "assistant", **self._turn})
            self._turn = {}
        return self._messages


def output_items(
    tokenizer: Tokenizer, answer: CompletionOutput, *, is_single: bool, with_logprobs: bool
) -> list[Item]:
    """What the model said, as items: reasoning, words, calls."""
    is_whole = answer.finish_reason is not None and answer.finish_reason.value == "stop"
    status = "completed" if is_whole else "incomplete"
    items: list[Item] = []
    calls = answer.tool_calls[:1] if is_single else answer.tool_calls
    if answer.reasoning:
        ended = "completed" if answer.content or calls else status
        items.append(reasoning_item(new_id("rs"), answer.reasoning, status=ended))
    if answer.content or not calls:
        logprobs = chat_logprobs(tokenizer, answer.content_logprobs) if with_logprobs else []
        items.append(message_item(new_id("msg"), answer.content, status=status, logprobs=logprobs))
    for call in calls:
        state = "completed" if call.is_complete else "incomplete"
        items.append(
            call_item(
                new_id("fc"), new_id("call"), call.name, arguments=call.arguments, status=state
            )
        )
    return items


def reasoning_item(item_id: str, text: str, *, status: str) -> Item:
    """The reasoning, in the clear; it can be sent back as it is."""
    return {
        "id": item_id,
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}] if text else [],
        "encrypted_content": None,
        "status": status,
    }


def message_item(item_id: str, text: str, *, status: str, logprobs: Sequence[Any] = ()) -> Item:
    """The words of the answer."""
    has_part = bool(text) or status != "in_progress"
    return {
        "id": item_id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [text_part(text, logprobs)] if has_part else [],
    }


def text_part(text: str, logprobs: Sequence[Any] = ()) -> Item:
    """A part of the words."""
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": list(logprobs),
    }


def call_item(item_id: str, call_id: str, name: str, *, arguments: str, status: str) -> Item:
    """A call to be run by the client."""
    return {
        "id": item_id,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    content = item.get("content")
    if content:
        return _text(content, f"{where}.content")
    return _text(item.get("summary") or "", f"{where}.summary")


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where} is not a text or a list of parts; give one of them")
    texts: list[str] = []
    for i, part in enumerate(cast(list[Any], value)):
        text: Any = cast(Mapping[str, Any], part).get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise DataError(f"{where}[{i}] is no part with a text; only texts can be read")
        texts.append(text)
    return "".join(texts)
