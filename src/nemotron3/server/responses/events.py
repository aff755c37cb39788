"""The events that build the items of a response.

An item begins with `output_item.added`, grows by deltas, and ends with `output_item.done`, which
has its complete content. Items do not overlap: one ends when a delta of another kind arrives.
"""

from typing import Any

from nemotron3.inference.output_processor import AnswerDelta
from nemotron3.server.generation.logprobs import chat_logprobs
from nemotron3.server.generation.serving import is_whole_json, new_id
from nemotron3.server.responses.items import (
    Item,
    call_item,
    message_item,
    reasoning_item,
    text_part,
)
from nemotron3.text import CallDelta, ContentDelta, ReasoningDelta, Tokenizer

Event = tuple[str, dict[str, Any]]
"""The type of an event, and its fields other than the sequence number."""


class ItemEvents:
    """Converts the deltas of one answer to events; `items` contains the finished items."""

    def __init__(self, tokenizer: Tokenizer, *, is_single: bool, with_logprobs: bool) -> None:
        self.items: list[Item] = []
        self._tokenizer = tokenizer
        self._is_single = is_single
        self._with_logprobs = with_logprobs
        self._open: Item | None = None
        self._call_index: int | None = None
        self._text = ""
        self._logprobs: list[Any] = []
        self._untold: list[Any] = []  # of tokens whose text is not complete yet

    def push(self, delta: AnswerDelta) -> list[Event]:
        """The events for one delta of the engine."""
        events: list[Event] = []
        if self._with_logprobs:
            self._untold += chat_logprobs(self._tokenizer, delta.content_logprobs)
        for part in delta.parts:
            match part:
                case ReasoningDelta():
                    events += self._reason(part.text)
                case ContentDelta():
                    events += self._say(part.text)
                case CallDelta():
                    events += self._call(part)
        return events

    def finish(self, *, is_whole: bool, token_fields: Item | None = None) -> list[Event]:
        """End the current item; an answer without text and calls gets an empty message.

        The last item has the `token_fields` of the turn.
        """
        events = self._close(status="completed" if is_whole else "incomplete")
        if not any(item["type"] in ("message", "function_call") for item in self.items):
            events += self._begin(message_item(new_id("msg"), "", status="in_progress"))
            events += [self._at("response.content_part.added", content_index=0, part=text_part(""))]
            events += self._close(status="completed" if is_whole else "incomplete")
        self.items[-1] |= token_fields or {}  # the event that ends it holds the same object
        return events

    def _reason(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._kind() != "reasoning":
            events += self._close()
            events += self._begin(reasoning_item(new_id("rs"), "", status="in_progress"))
            part = {"type": "reasoning_text", "text": ""}
            events.append(self._at("response.content_part.added", content_index=0, part=part))
        self._text += text
        events.append(self._at("response.reasoning_text.delta", content_index=0, delta=text))
        return events

    def _say(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._kind() != "message":
            events += self._close()
            events += self._begin(message_item(new_id("msg"), "", status="in_progress"))
            events.append(
                self._at("response.content_part.added", content_index=0, part=text_part(""))
            )
        logprobs, self._untold = self._untold, []
        self._text += text
        self._logprobs += logprobs
        events.append(
            self._at("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        )
        return events

    def _call(self, part: CallDelta) -> list[Event]:
        if self._is_single and part.index > 0:
            return []
        events: list[Event] = []
        if self._kind() != "function_call" or self._call_index != part.index:
            events += self._close()
            self._call_index = part.index
            name = part.name or ""
            item = call_item(new_id("fc"), new_id("call"), name, arguments="", status="in_progress")
            events += self._begin(item)
        if part.arguments:
            self._text += part.arguments
            events.append(self._at("response.function_call_arguments.delta", delta=part.arguments))
        return events

    def _kind(self) -> str | None:
        return self._open["type"] if self._open is not None else None

    def _begin(self, item: Item) -> list[Event]:
        self._open = item
        self._text, self._logprobs = "", []
        added = {"output_index": len(self.items), "item": item}
        return [("response.output_item.added", added)]

    def _close(self, *, status: str = "completed") -> list[Event]:
        opened, text = self._open, self._text
        if opened is None:
            return []
        events: list[Event] = []
        if opened["type"] == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            events.append(self._at("response.reasoning_text.done", content_index=0, text=text))
            events.append(self._at("response.content_part.done", content_index=0, part=part))
            item = reasoning_item(opened["id"], text, status=status)
        elif opened["type"] == "message":
            logprobs = [*self._logprobs, *self._untold]
            self._untold = []
            part = text_part(text, logprobs)
            done = self._at(
                "response.output_text.done", content_index=0, text=text, logprobs=logprobs
            )
            events.append(done)
            events.append(self._at("response.content_part.done", content_index=0, part=part))
            item = message_item(opened["id"], text, status=status, logprobs=logprobs)
        else:
            name = opened["name"]
            events.append(
                self._at("response.function_call_arguments.done", name=name, arguments=text)
            )
            # The start of another call may cut off a call.
            is_whole = is_whole_json(text)
            item = {
                **opened,
                "arguments": text,
                "status": "completed" if is_whole else "incomplete",
            }
        events.append(
            ("response.output_item.done", {"output_index": len(self.items), "item": item})
        )
        self.items.append(item)
        self._open = None
        return events

    def _at(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        return kind, {"output_index": len(self.items), "item_id": self._open["id"], **fields}
