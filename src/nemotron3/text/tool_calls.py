r"""Streaming parser of the family's tool calls in an answer.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

The format has no escaping, so a value may contain text that looks like its end. A value is ended by

- `</parameter>`, if the next parameter or the end of the function follows it, and if it is not
  inside a string within a JSON list or object (such a string contains no line end);
- the opening tag of a declared parameter at the start of a line, if that parameter has not been
  given: a missing `</parameter>` then loses nothing;
- a special token of calls (`push_tag`), which never occurs as ordinary text. A `</function>` just
  before `</tool_call>` has then closed the function.

Anywhere else these are text, and so are `<`, `</function>` and, as characters, `</tool_call>`. One
line end after the opening tag and one before the closing tag belong to the format, all others to
the value.

Every decision waits until it is certain, so the way in which the stream is cut into pieces affects
only the number of deltas. A call is announced (name first) when its first parameter or its end has
begun; its arguments follow as fragments that concatenate to JSON. Text values are streamed; other
values are returned when they are complete, because their type decides how they are written.

- A call that is malformed before it is announced (`<tool_call>` without a function, arguments as
  bare JSON) is not a call: its text is content, and parsing continues after `<tool_call>`.
- A call that the end of the stream or a special token leaves unfinished, or that gives a parameter
  twice, is kept with `is_complete` false, and its arguments are not closed. So no client can
  mistake it for a complete call.
- White space between text and a call, and between calls, belongs to the template and is dropped.

With `tags_in_text=False` a call begins only with the special token `<tool_call>` (`push_tag`): an
answer that quotes the format is then not a call.

`parameter_types.py` defines how values are written. A call of a function that was not offered is
parsed like any other; the caller must check the name.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from nemotron3.text.messages import MAX_NAME, Tool
from nemotron3.text.parameter_types import ANYTHING, ParameterType
from nemotron3.text.reasoning import partial_suffix
from nemotron3.text.tool_parameters import ToolParameters
from nemotron3.text.vocabulary import TOOL_CALL_END, TOOL_CALL_START

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME_END = re.compile(r"[<>\n]")
_STRING_MARK = re.compile(r'\\.?|"|\n', re.DOTALL)
_LAST_CLOSING = re.compile(r"\n?</function>\s*\Z")


@dataclass(frozen=True)
class ContentDelta:
    """Text of the answer outside of calls."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A part of call number `index`: first its name, then fragments of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass
class ParsedCall:
    """A parsed call: `arguments` is JSON text if `is_complete`, else the beginning of one."""

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
    """More text is needed to decide."""


@dataclass
class _Value:
    """The argument that is being read; `parts` collect its text if it cannot be streamed."""

    type: ParameterType = ANYTHING
    openings: tuple[str, ...] = ()
    """Opening tags of the parameters that may follow it."""
    has_begun: bool = False
    is_empty: bool = True
    parts: list[str] = field(default_factory=list[str])
    is_in_string: bool = False
    """Whether the text so far ends inside a string within a JSON list or object."""
    is_json: bool | None = None
    is_escaped: bool = False

    def collect(self, text: str) -> None:
        """Add text of the value."""
        self.parts.append(text)
        if self.is_json is None and text.strip():
            self.is_json = text.lstrip()[0] in "[{"
        if not self.is_json:
            return
        at = int(self.is_escaped and not text.startswith("\n"))
        self.is_escaped = False
        for mark in _STRING_MARK.finditer(text, at):
            self.is_escaped = mark[0] == "\\"
            if mark[0] == '"':
                self.is_in_string = not self.is_in_string
            elif mark[0].endswith("\n"):
                self.is_in_string = False


class ToolCallParser:
    """Parses one stream; one object per answer. `calls` holds the calls so far."""

    def __init__(self, tools: Sequence[Tool] = (), *, tags_in_text: bool = True) -> None:
        self.calls: list[ParsedCall] = []
        self._tools = {tool.name: tool for tool in tools}
        self._parameters: dict[str, ToolParameters] = {}  # of the functions that were called
        self._tags_in_text = tags_in_text
        self._state = _State.TEXT
        self._deltas: list[ContentDelta | CallDelta] = []
        self._buffer = ""  # not decided yet
        self._blanks = ""  # white space before a possible `<tool_call>`
        self._follows_call = False
        self._value = _Value()
        self._given: set[str] = set()  # parameters of this call
        self._is_whole = True

    @property
    def is_open(self) -> bool:
        """Whether the next text may belong to a call."""
        return self._state is not _State.TEXT

    def push(self, text: str) -> list[ContentDelta | CallDelta]:
        """Add a piece of the answer; returns the parts that are certain."""
        self._buffer += text
        # Text that cannot be decided yet ends the loop; it is read again when more has arrived.
        with suppress(_UndecidedError):
            while self._buffer:
                self._step()
        return self._take()

    def push_tag(self, tag: str) -> list[ContentDelta | CallDelta]:
        """Add a special token of calls; it ends an open call."""
        was_open = self._state is not _State.TEXT
        if self._state is _State.OPENING:
            self._no_call(len(self._buffer))
            was_open = False
        elif was_open:
            if self._state is _State.VALUE:
                self._cut_value(tag)
            self._end_call("")
        if tag == TOOL_CALL_START:
            self._open(self._buffer, "")
            return self._take()
        return self._take() + ([] if was_open and tag == TOOL_CALL_END else self.push(tag))

    def finish(self) -> list[ContentDelta | CallDelta]:
        """End the stream; returns the buffered parts."""
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
        sure = len(self._buffer[:sure].rstrip())  # white space waits: it is dropped before a call
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
        self._given, self._is_whole = set(), True
        self._deltas.append(CallDelta(len(self.calls) - 1, name=name[0]))
        self._state = _State.PARAMETERS

    def _no_call(self, length: int) -> None:
        """Treat text that began like a call as content, and read the text after it again."""
        self._content(self._blanks + self._buffer[:length])
        self._blanks = ""
        self._buffer = self._buffer[length:]
        self._state = _State.TEXT

    def _read_parameter(self) -> None:
        found = self._expect(0, (_PARAMETER, _FUNCTION_END))
        assert found is not None, "what follows a value is looked at before the value ends"
        if found[0] == _FUNCTION_END:
            self._buffer = self._buffer[found[1] :]
            self._end_function()
            return
        found = self._name(found[1])
        assert found is not None, "what follows a value is looked at before the value ends"
        name, end = found
        self._buffer = self._buffer[end:]
        parameters = self._parameters_of(self.calls[-1].name)
        self._is_whole = self._is_whole and name not in self._given
        self._given.add(name)
        follow = sorted(parameters.names - self._given)
        self._value = _Value(parameters.type(name), tuple(f"{_PARAMETER}{n}>" for n in follow))
        opening = ", " if self.calls[-1].arguments else "{"
        is_text = self._value.type.is_plain_text
        self._argue(f"{opening}{_json(name)}: " + ('"' if is_text else ""))
        self._state = _State.VALUE

    def _parameters_of(self, function: str) -> ToolParameters:
        if function not in self._parameters:
            self._parameters[function] = ToolParameters(self._tools.get(function))
        return self._parameters[function]

    def _read_value(self) -> None:
        if not self._value.has_begun:
            self._value.has_begun = True
            self._buffer = self._buffer.removeprefix("\n")
        end, opening = self._buffer.find(_PARAMETER_END), self._find_opening()
        if opening >= 0 and not 0 <= end < opening:
            self._pass_on(opening)
            self._buffer = self._buffer.removeprefix("\n")
            self._end_value()
            self._state = _State.PARAMETERS
            return
        if end < 0:
            self._pass_on(len(self._buffer) - self._undecided_length())
            raise _UndecidedError
        after = self._pass_to(end)
        if not self._is_in_string() and self._continues(after):
            self._buffer = self._buffer[after:]
            self._end_value()
            self._state = _State.PARAMETERS
        else:
            self._pass_on(after)

    def _find_opening(self) -> int:
        """Index where the opening tag of a parameter that may follow ends the value, or -1."""
        at_start = self._value.openings if self._value.is_empty else ()
        if self._buffer.startswith(at_start):
            return 0
        found = [self._buffer.find("\n" + opening) for opening in self._value.openings]
        return min((at for at in found if at >= 0), default=-1)

    def _undecided_length(self) -> int:
        """Length of the buffer's end that may be the start of a tag, not text of the value."""
        value = self._value
        markers = [_PARAMETER_END, "\n" + _PARAMETER_END, *("\n" + o for o in value.openings)]
        markers += value.openings if value.is_empty else ()
        if self._tags_in_text:
            return partial_suffix(self._buffer, markers)
        last = _LAST_CLOSING.search(self._buffer)
        length = len(self._buffer) - last.start() if last is not None else 0
        return max(length, partial_suffix(self._buffer, (*markers, _FUNCTION_END, "\n</function>")))

    def _is_in_string(self) -> bool:
        return self._value.is_in_string and not self._buffer.startswith("\n")

    def _pass_to(self, end: int) -> int:
        """Add the text before a `</parameter>` to the value; returns where the tag ends."""
        self._pass_on(end - self._buffer[:end].endswith("\n"))
        return self._buffer.index(_PARAMETER_END) + len(_PARAMETER_END)

    def _pass_on(self, length: int) -> None:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if not text:
            return
        self._value.is_empty = False
        if self._value.type.is_plain_text:
            self._argue(_json(text)[1:-1])
        else:
            self._value.collect(text)

    def _end_value(self) -> None:
        value = self._value
        is_text = value.type.is_plain_text
        self._argue('"' if is_text else value.type.read_json("".join(value.parts)))

    def _cut_value(self, tag: str) -> None:
        """End a value at a special token."""
        last = _LAST_CLOSING.search(self._buffer) if tag == TOOL_CALL_END else None
        if last is None or _PARAMETER_END in self._buffer:
            self._finish_value()
            return
        self._pass_on(last.start())
        if self._is_in_string():
            self._finish_value()
            return
        self._end_value()
        self._end_function()

    def _finish_value(self) -> None:
        end = self._buffer.find(_PARAMETER_END)
        if end >= 0:
            self._pass_to(end)
            if not self._is_in_string():
                self._end_value()
                return
        self._pass_on(len(self._buffer))
        if not self._value.type.is_plain_text:
            self._argue(_json("".join(self._value.parts))[:-1])

    def _end_function(self) -> None:
        call = self.calls[-1]
        if self._is_whole:
            self._argue("}" if call.arguments else "{}")
            call.is_complete = True
        self._state = _State.CLOSING

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
        """The marker at `at`, after white space, and the index where it ends."""
        rest = self._buffer[at:].lstrip()
        for marker in markers:
            if rest.startswith(marker):
                return marker, len(self._buffer) - len(rest) + len(marker)
        if any(marker.startswith(rest) for marker in markers):
            raise _UndecidedError
        return None

    def _name(self, at: int) -> tuple[str, int] | None:
        """The name between `at` and the next `>`, and the index after that."""
        found = _NAME_END.search(self._buffer, at, at + MAX_NAME)
        if found is None and len(self._buffer) < at + MAX_NAME:
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
    """Content and calls of a complete answer whose tags are characters."""
    parser = ToolCallParser(tools)
    deltas = [*parser.push(text), *parser.finish()]
    return "".join(d.text for d in deltas if isinstance(d, ContentDelta)), parser.calls


def _json(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
