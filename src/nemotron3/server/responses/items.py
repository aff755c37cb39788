"""Items as messages for the chat template, and an answer as items.

A turn of the assistant is several items: its reasoning, its text, each call. For the template it is
one message with all of them, so consecutive items of these types are joined.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from nemotron3.errors import DataError
from nemotron3.inference.output_processor import CompletionOutput
from nemotron3.server.generation.logprobs import chat_logprobs
from nemotron3.server.generation.serving import new_id
from nemotron3.server.generation.token_ids import ANSWER_IDS, PROMPT_IDS, history_ids
from nemotron3.text import Tokenizer
from nemotron3.text.messages import parse_call

Item = dict[str, Any]

_PLAIN = ("user", "system", "developer")


def items_of(given: str | Sequence[Item]) -> list[Item]:
    """The input as items; a string is a message of the user."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return [dict(item) for item in given]


def messages_of(
    items: Sequence[Item], instructions: str | None, *, num_stored: int = 0
) -> list[dict[str, Any]]:
    """The conversation as messages for the chat template.

    The first `num_stored` items come from the previous response, the others are the request's
    `input`. Raises `DataError` with the place of the mistake.
    """
    turns = _Turns()
    with_ids = [i for i, item in enumerate(items) if item.get(PROMPT_IDS) is not None]
    num_known = with_ids[-1] + 1 if with_ids else 0
    if instructions is not None:
        turns.say({"role": "system", "content": instructions})
    for i, item in enumerate(items[:num_stored]):
        try:
            turns.add(item, f"items[{i}]", has_ids=i < num_known)
        except DataError as error:
            raise DataError(
                f": that conversation cannot be continued; {error}", field="previous_response_id"
            ) from error
    for i, item in enumerate(items[num_stored:]):
        turns.add(item, f"input[{i}]", has_ids=num_stored + i < num_known)
    return turns.end()


class _Turns:
    """The messages so far, and the assistant's turn to which items are added."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] = {}

    def say(self, message: dict[str, Any]) -> None:
        """Add a message that is not the assistant's."""
        self.end()
        self._messages.append(message)

    def add(self, item: Item, where: str, *, has_ids: bool) -> None:
        """Add an item of any type; `where` is its place in the request.

        One that `has_ids`, or is before such a one, is not rendered. So its call may be cut off.
        """
        kind = item.get("type", "message")
        match kind:
            case "message":
                self._add_message(item, where)
            case "reasoning":
                self.end()  # a turn of the assistant begins with its reasoning
                self._turn["reasoning_content"] = _reasoning(item, where)
                self._note_ids(item, where)
            case "function_call":
                self._add_call(item, where, is_read=not has_ids)
                self._note_ids(item, where)
            case "function_call_output":
                self._add_call_output(item, where)
            case _:
                raise DataError(
                    f"is {kind!r}; the items are message, reasoning, function_call, "
                    f"function_call_output",
                    field=f"{where}.type",
                )

    def _add_message(self, item: Item, where: str) -> None:
        role = item.get("role")
        text = _text(item.get("content"), f"{where}.content")
        if role == "assistant":
            if "content" in self._turn or "tool_calls" in self._turn:
                self.end()
            self._turn["content"] = text
            self._note_ids(item, where)
        elif role in _PLAIN:
            self.say({"role": role, "content": text})
        else:
            raise DataError(
                f"is {role!r}; the roles are user, assistant, system, developer",
                field=f"{where}.role",
            )

    def _note_ids(self, item: Item, where: str) -> None:
        """Keep the ids of a turn, which its last item has."""
        if history_ids(item, where) is not None:
            self._turn |= {name: item[name] for name in (PROMPT_IDS, ANSWER_IDS)}

    def _add_call(self, item: Item, where: str, *, is_read: bool) -> None:
        function = {key: item.get(key) for key in ("name", "arguments")}
        if is_read:
            parse_call(function, where)  # so that an error names the item and not the message
        call = {"id": _call_id(item, where), "type": "function", "function": function}
        self._turn.setdefault("tool_calls", []).append(call)

    def _add_call_output(self, item: Item, where: str) -> None:
        text = _text(item.get("output"), f"{where}.output")
        self.end()
        first = self._messages[0]["role"] if self._messages else None
        if len(self._messages) == (first in ("system", "developer")):
            raise DataError(
                "is a tool's answer and nothing was asked before it; a message of the user or of "
                "the assistant must come first",
                field=where,
            )
        self.say({"role": "tool", "tool_call_id": _call_id(item, where), "content": text})

    def end(self) -> list[dict[str, Any]]:
        """End the turn of the assistant; returns all messages."""
        if self._turn:
            self._messages.append({"role": "assistant", **self._turn})
            self._turn = {}
        return self._messages


def output_items(
    tokenizer: Tokenizer, answer: CompletionOutput, *, is_single: bool, with_logprobs: bool
) -> list[Item]:
    """The answer as items: reasoning, message, calls."""
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
    """An item of reasoning, as plain text that clients can send back."""
    return {
        "id": item_id,
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}] if text else [],
        "encrypted_content": None,
        "status": status,
    }


def message_item(item_id: str, text: str, *, status: str, logprobs: Sequence[Any] = ()) -> Item:
    """An item of the answer's text."""
    has_part = bool(text) or status != "in_progress"
    return {
        "id": item_id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [text_part(text, logprobs)] if has_part else [],
    }


def text_part(text: str, logprobs: Sequence[Any] = ()) -> Item:
    """A part of a message."""
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": list(logprobs),
    }


def call_item(item_id: str, call_id: str, name: str, *, arguments: str, status: str) -> Item:
    """An item of a call, which the client executes."""
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


def _call_id(item: Mapping[str, Any], where: str) -> str | None:
    call_id = item.get("call_id")
    if call_id is not None and not isinstance(call_id, str):
        raise DataError(f"is {call_id!r}; a text was expected", field=f"{where}.call_id")
    return call_id


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError("is not a text or a list of parts; give one of them", field=where)
    texts: list[str] = []
    for i, part in enumerate(cast(list[Any], value)):
        text: Any = cast(Mapping[str, Any], part).get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise DataError("is no part with a text; only texts can be read", field=f"{where}[{i}]")
        texts.append(text)
    return "".join(texts)
