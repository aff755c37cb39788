r"""Read the family's tool calls out of an answer while it arrives.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

The format has no escaping, so what ends a value has to be told from what is in it. Here a
`</parameter>` ends a value only where the next parameter or the end of the function follows it;
anywhere else it is text, and so are `<`, `</function>` and `</tool_call>`. One line end after the
opening and one before the closing belong to the format, all others to the value.

Every decision waits until it is certain, so how the stream is cut into pieces changes nothing but
the number of deltas. A call is announced (name first) when its first parameter or its end has
begun; its arguments follow as fragments that join to JSON. Text values are passed on as they come,
all others when they are whole, because their type decides how they are written.

- Malformed before it is announced (`<tool_call>` without a function, arguments as bare JSON): it
  was no call. Its text is content, all of it, and reading goes on after `<tool_call>`.
- Unfinished at the end of the stream: the call stays, `is_complete` is false, and its arguments
  stay unclosed, so that no client can take half an argument for a whole one.
- White space between text and a call, and between calls, is the template's glue and is dropped.

With `tags_in_text=False` a call begins only where `push_tag` says so (the special token
`<tool_call>`): an answer that quotes the format is then no call.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from nemotron3.text.arguments import is_plain_text, read_argument
from nemotron3.text.messages import Json, Tool
from nemotron3.text.reasoning import partial_suffix
from nemotron3.text.vocabulary import TOOL_CALL_END, TOOL_CALL_START

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME_END = re.compile(r"[<>\n]")
_MAX_NAME = 256  # characters; OpenAI allows 64


@dataclass(frozen=True)
class ContentDelta:
    """Text of the answer outside of calls."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A part of call number `index`: its name once, at first, then fragments of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass
class ParsedCall:
    """A call as read: `arguments` is JSON text, whole if `is_complete`, else its beginning."""

    name: str
    arguments: str = ""
    is_complete: bool = False


class _State(Enum):
    TEXT = auto()
    OPENING = auto()  # from `<tool_call>` to the first parameter or the function's end
    PARAMETERS = auto()  # between values
    VALUE = auto()
    CLOSING = auto()  # after the function's end


class _UndecidedError(Exception):
    """More text is needed to tell."""


@dataclass
class _Value:
    """The argument being read; `parts` collect it where it cannot be passed on as it comes."""

    schema: Mapping[str, Json] | None = None
    root: Mapping[str, Json] | None = None
    is_text: bool = False
    has_begun: bool = False
    parts: list[str] = field(default_factory=list[str])


class ToolCallParser:
    """Reads one stream; one object per answer. `calls` holds what was read so far."""

    def __init__(self, tools: Sequence[Tool] = (), *, tags_in_text: bool = True) -> None:
        self.calls: list[ParsedCall] = []
        self._tools = {tool.name: tool for tool in tools}
        self._tags_in_text = tags_in_text
        self._state = _State.TEXT
        self._deltas: list[ContentDelta | CallDelta] = []
        self._buffer = ""  # not decided yet
        self._blanks = ""  # white space before a `<tool_call>` that may prove to be no call
        self._follows_call = False
        self._value = _Value()

    @property
    def is_open(self) -> bool:
        """Whether what comes next belongs to a call, or may."""
        return self._state is not _State.TEXT

    def push(self, text: str) -> list[ContentDelta | CallDelta]:
        """Take a piece of the answer; what is certain now comes back."""
        self._buffer += text
        # What cannot be decided yet ends the loop; the buffer is then read again with more in it.
        with suppress(_UndecidedError):
            while self._buffer:
                self._step()
        return self._take()

    def push_tag(self) -> list[ContentDelta | CallDelta]:
        """Take the special token `<tool_call>`."""
        if self._state is _State.VALUE:
            # Read as text where a call is open, whoever says it.
            return self.push(TOOL_CALL_START)
        if self._state is _State.CLOSING:
            self._end_call("")
        elif self._state is _State.OPENING:
            self._no_call(len(self._buffer))
        self._open(self._buffer, "")
        return self._take()

    def finish(self) -> list[ContentDelta | CallDelta]:
        """End the stream; what was held back comes."""
        if self._state is _State.VALUE:
            self._finish_value()
        elif self._state in (_State.TEXT, _State.OPENING):
            rest = self._blanks + self._buffer
            if not (self._follows_call and rest.isspace()):
                self._content(rest)
        self._blanks = self._buffer = ""
        self._state = _State.TEXT
        return self._take()

    def _take(self) -> list[ContentDelta | CallDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _step(self) -> None:
        """Make one decision, or raise _UndecidedError."""
        match self._state:
            case _State.TEXT:
                self._read_text()
            case _State.OPENING:
                self._read_opening()
            case _State.PARAMETERS:
                self._read_parameter()
            case _State.VALUE:
                self._read_value()
            case _State.CLOSING:
                self._read_closing()

    def _read_text(self) -> None:
        before, tag, after = self._buffer, "", ""
        sure = len(before)
        if self._tags_in_text:
            before, tag, after = self._buffer.partition(TOOL_CALL_START)
            sure -= partial_suffix(self._buffer, (TOOL_CALL_START,))
        if tag:
            self._open(before, after)
            return
        sure = len(self._buffer[:sure].rstrip())  # white space waits: a call would drop it
        self._content(self._buffer[:sure])
        self._buffer = self._buffer[sure:]
        raise _UndecidedError

    def _open(self, before: str, after: str) -> None:
        kept = before.rstrip()
        self._content(kept)
        self._blanks = before[len(kept) :]
        self._buffer = TOOL_CALL_START + after
        self._state = _State.OPENING

    def _read_opening(self) -> None:
        tag = TOOL_CALL_START if self._buffer.startswith(TOOL_CALL_START) else ""
        function = self._expect(len(tag), (_FUNCTION,))
        name = self._name(function[1]) if function is not None else None
        if name is None or not self._continues(name[1]):
            self._no_call(len(tag) or 1)
            return
        self._blanks = ""
        self._buffer = self._buffer[name[1] :]
        self.calls.append(ParsedCall(name[0]))
        self._deltas.append(CallDelta(len(self.calls) - 1, name=name[0]))
        self._state = _State.PARAMETERS

    def _no_call(self, length: int) -> None:
        """What began like a call is content; what follows it is read again."""
        self._content(self._blanks + self._buffer[:length])
        self._blanks = ""
        self._buffer = self._buffer[length:]
        self._state = _State.TEXT

    def _read_parameter(self) -> None:
        found = self._expect(0, (_PARAMETER, _FUNCTION_END))
        assert found is not None, "what follows a value is looked at before the value ends"
        call = self.calls[-1]
        if found[0] == _FUNCTION_END:
            self._buffer = self._buffer[found[1] :]
            self._argue("}" if call.arguments else "{}")
            call.is_complete = True
            self._state = _State.CLOSING
            return
        name = self._name(found[1])
        assert name is not None, "what follows a value is looked at before the value ends"
        self._buffer = self._buffer[name[1] :]
        tool = self._tools.get(call.name)
        self._value = _Value()
        if tool is not None:
            self._value.schema = tool.parameter_schema(name[0])
            self._value.root = tool.parameters
        is_text = is_plain_text(self._value.schema, root=self._value.root)
        self._value.is_text = is_text
        opening = ", " if call.arguments else "{"
        self._argue(f"{opening}{_json(name[0])}: " + ('"' if is_text else ""))
        self._state = _State.VALUE

    def _read_value(self) -> None:
        if not self._value.has_begun:
            self._value.has_begun = True
            self._buffer = self._buffer.removeprefix("\n")
        end = self._buffer.find(_PARAMETER_END)
        if end < 0:
            held = partial_suffix(self._buffer, (_PARAMETER_END, "\n" + _PARAMETER_END))
            self._pass_on(len(self._buffer) - held)
            raise _UndecidedError
        self._pass_on(end - self._buffer[:end].endswith("\n"))
        after = self._buffer.index(_PARAMETER_END) + len(_PARAMETER_END)
        if self._continues(after):
            self._buffer = self._buffer[after:]
            self._end_value()
            self._state = _State.PARAMETERS
        else:
            self._pass_on(after)

    def _pass_on(self, length: int) -> None:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if self._value.is_text and text:
            self._argue(_json(text)[1:-1])
        elif text:
            self._value.parts.append(text)

    def _end_value(self) -> None:
        value = self._value
        if value.is_text:
            self._argue('"')
        else:
            read = read_argument("".join(value.parts), value.schema, root=value.root)
            self._argue(_json(read))

    def _finish_value(self) -> None:
        end = self._buffer.find(_PARAMETER_END)
        if end >= 0:
            self._pass_on(end - self._buffer[:end].endswith("\n"))
            self._end_value()
            return
        self._pass_on(len(self._buffer))
        if not self._value.is_text:
            self._argue(_json("".join(self._value.parts))[:-1])

    def _read_closing(self) -> None:
        found = self._expect(0, (TOOL_CALL_END, _FUNCTION))
        if found is not None and found[0] == _FUNCTION:
            self._buffer = self._buffer[found[1] - len(_FUNCTION) :]
            self._state = _State.OPENING
        else:
            self._end_call(self._buffer if found is None else self._buffer[found[1] :])

    def _end_call(self, rest: str) -> None:
        self._buffer = rest
        self._follows_call = True
        self._state = _State.TEXT

    def _continues(self, at: int) -> bool:
        """Whether a parameter or the end of the function follows."""
        found = self._expect(at, (_PARAMETER, _FUNCTION_END))
        if found is None:
            return False
        return found[0] == _FUNCTION_END or self._name(found[1]) is not None

    def _expect(self, at: int, markers: tuple[str, ...]) -> tuple[str, int] | None:
        """The marker that stands at `at` after white space, and where it ends."""
        rest = self._buffer[at:].lstrip()
        for marker in markers:
            if rest.startswith(marker):
                return marker, len(self._buffer) - len(rest) + len(marker)
        if any(marker.startswith(rest) for marker in markers):
            raise _UndecidedError
        return None

    def _name(self, at: int) -> tuple[str, int] | None:
        """The name between `at` and the next `>`, and where that ends."""
        found = _NAME_END.search(self._buffer, at, at + _MAX_NAME)
        if found is None and len(self._buffer) < at + _MAX_NAME:
            raise _UndecidedError
        if found is None:
            return None
        name = self._buffer[at : found.start()]
        return (name, found.end()) if found[0] == ">" and name else None

    def _content(self, text: str) -> None:
        if text:
            self._follows_call = False
            self._deltas.append(ContentDelta(text))

    def _argue(self, text: str) -> None:
        self.calls[-1].arguments += text
        self._deltas.append(CallDelta(len(self.calls) - 1, arguments=text))


def parse_tool_calls(text: str, tools: Sequence[Tool] = ()) -> tuple[str, list[ParsedCall]]:
    """Content and calls of a whole answer whose tags are characters."""
    parser = ToolCallParser(tools)
    deltas = [*parser.push(text), *parser.finish()]
    return "".join(d.text for d in deltas if isinstance(d, ContentDelta)), parser.calls


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)
