r"""Separate a model's reasoning from its answer while the tokens arrive.

The rules are those of the family's own parsers (DeepSeek-R1's): where the prompt opened a
`<think>` block, the output is reasoning until `</think>`; where it did not, all output is answer,
unless the model opens a block itself. Cases that these rules leave open are decided here:

- **A tag is a token.** With the ids known, `</think>` closes the reasoning only as the special
  token; a model that writes the eight characters is talking about the tag. Without the ids
  (`tags_in_text`) the characters have to do, however they are cut into pieces.
- **A tag counts at the edge of a section.** `<think>` before any reasoning repeats the prompt,
  `</think>` before any answer repeats the close: both vanish. `<think>` before any answer opens
  the reasoning again. Anywhere else they are text, so nothing of an answer is lost.
- **A call ends the reasoning** where tools were offered: models leave out `</think>` before
  `<tool_call>` in some percent of their calls (TensorRT-LLM #13684). It must look like a call
  (`<tool_call>`, then `<function=`); reasoning that merely mentions the tag goes on.
- **Never closed** means never answered: all of it is reasoning and the answer is empty. A caller
  who cannot use that sets `force_nonempty_content`, and the reasoning is given as the answer.

White space around the sections is the template's glue and is dropped: both ends of the reasoning,
and the start of an answer that follows one (`keep_whitespace` keeps all of it).

    splitter = ReasoningSplitter(is_open=True)
    splitter.push("2+2 is"); splitter.push(" 4.\n"); splitter.push_tag("</think>")
    splitter.push("\nFour")      # [Span("Four", is_reasoning=False)]
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from nemotron3.text.vocabulary import (
    THINK_END,
    THINK_START,
    TOOL_CALL_END,
    TOOL_CALL_START,
    TOOL_RESPONSE_END,
    TOOL_RESPONSE_START,
)

TAGS = (THINK_START, THINK_END, TOOL_CALL_START)
"""The tags that tell reasoning, answer and calls apart."""
CALL_TAGS = (TOOL_CALL_END, TOOL_RESPONSE_START, TOOL_RESPONSE_END)
"""Tags that are text here, and handed on as what they are to whoever reads the answer."""

_ANY_TAG = re.compile("|".join(TAGS))
_CALL_NEXT = "<function="


@dataclass(frozen=True)
class Span:
    """Text of one section; `is_tag` where it is a special token of calls itself."""

    text: str
    is_reasoning: bool
    is_tag: bool = False


class _State(Enum):
    REASONING = auto()
    PERHAPS_CALL = auto()  # inside the reasoning, after `<tool_call>`
    ANSWER = auto()


class ReasoningSplitter:
    """Splits one stream; one object per answer.

    `is_open` is whether the prompt left a `<think>` block open (`RenderedChat.is_reasoning_open`).
    """

    def __init__(
        self,
        *,
        is_open: bool,
        tags_in_text: bool = False,
        has_tools: bool = False,
        keep_whitespace: bool = False,
        force_nonempty_content: bool = False,
    ) -> None:
        self._state = _State.REASONING if is_open else _State.ANSWER
        self._tags_in_text = tags_in_text
        self._has_tools = has_tools
        self._keep_whitespace = keep_whitespace
        self._force_nonempty_content = force_nonempty_content
        self._spans: list[Span] = []
        self._unread = ""  # may still become a tag (tags_in_text)
        self._perhaps_call = ""  # after a `<tool_call>` in the reasoning
        self._blanks: str = ""  # at the end of the reasoning so far
        self._is_at_start = True  # of a block of reasoning
        self._reasoning: list[str] = []
        self._has_answer = False
        self._strips_answer = False

    @property
    def is_reasoning_open(self) -> bool:
        """Whether the next token belongs to the reasoning, as far as can be told."""
        return self._state is not _State.ANSWER

    @property
    def is_undecided(self) -> bool:
        """Whether the last of the text may turn out to be no reasoning: a tag or a call."""
        return self._state is _State.PERHAPS_CALL or bool(self._unread)

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._reasoning)

    def push(self, text: str) -> list[Span]:
        """Take a piece of text; what is certain now comes back, section by section."""
        if not self._tags_in_text:
            self._text(text)
            return self._take()
        self._unread += text
        while (found := _ANY_TAG.search(self._unread)) is not None:
            self._text(self._unread[: found.start()])
            self._unread = self._unread[found.end() :]
            self._tag(found[0])
        certain = len(self._unread) - partial_suffix(self._unread, TAGS)
        self._text(self._unread[:certain])
        self._unread = self._unread[certain:]
        return self._take()

    def push_tag(self, tag: str) -> list[Span]:
        """Take a special token, one of `TAGS` and `CALL_TAGS`."""
        assert tag in (*TAGS, *CALL_TAGS), f"{tag} is text to the splitter"
        self._tag(tag)
        return self._take()

    def finish(self) -> list[Span]:
        """End the stream; what was held back comes, and the swap is made where it was asked for.

        After a swap the reasoning has been given twice, once as such while it arrived. A caller
        that sends one message instead of a stream leaves the first out (`was_swapped`).
        """
        self._text(self._unread)
        self._unread = ""
        if self._state is _State.PERHAPS_CALL:
            self._no_call()
        if self.was_swapped:
            self._spans.append(Span(self.reasoning, is_reasoning=False))
        return self._take()

    @property
    def was_swapped(self) -> bool:
        """Whether, the stream being over, the reasoning is the answer."""
        return self._force_nonempty_content and not self._has_answer and bool(self._reasoning)

    def _take(self) -> list[Span]:
        spans, self._spans = self._spans, []
        return spans

    def _tag(self, tag: str) -> None:
        if self._state is _State.PERHAPS_CALL:
            self._no_call()
        if self._state is _State.REASONING:
            if tag == THINK_END:
                self._close()
            elif tag == TOOL_CALL_START and self._has_tools:
                self._state = _State.PERHAPS_CALL
            elif tag != THINK_START or self._reasoning:
                self._text(tag)
        elif tag == TOOL_CALL_START:
            self._call()
        elif tag in CALL_TAGS:
            self._has_answer = True
            self._spans.append(Span(tag, is_reasoning=False, is_tag=True))
        elif self._has_answer:
            self._text(tag)
        elif tag == THINK_START:
            self._state = _State.REASONING
            self._is_at_start = True
            self._blanks = "\n" if self._reasoning else ""

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._state is _State.PERHAPS_CALL:
            self._perhaps_call += text
            rest = self._perhaps_call.lstrip()
            if rest.startswith(_CALL_NEXT):
                held, self._perhaps_call = self._perhaps_call, ""
                self._close()
                self._call()
                self._text(held)
            elif not _CALL_NEXT.startswith(rest):
                self._no_call()
        elif self._state is _State.REASONING:
            self._reason(text)
        else:
            self._answer(text)

    def _reason(self, text: str) -> None:
        if not self._keep_whitespace:
            text = text.lstrip() if self._is_at_start else text
            if not text:
                return
            text = self._blanks + text
            kept = text.rstrip()
            self._blanks = text[len(kept) :]
            text = kept
        self._is_at_start = False
        if text:
            self._reasoning.append(text)
            self._spans.append(Span(text, is_reasoning=True))

    def _answer(self, text: str) -> None:
        if self._strips_answer and not self._has_answer:
            text = text.lstrip()
        if text:
            self._has_answer = self._has_answer or not text.isspace()
            self._spans.append(Span(text, is_reasoning=False))

    def _close(self) -> None:
        self._state = _State.ANSWER
        self._strips_answer = not self._keep_whitespace

    def _call(self) -> None:
        self._has_answer = True
        self._spans.append(Span(TOOL_CALL_START, is_reasoning=False, is_tag=True))

    def _no_call(self) -> None:
        held, self._perhaps_call = self._perhaps_call, ""
        self._state = _State.REASONING
        self._text(TOOL_CALL_START + held)


def split_reasoning(
    text: str,
    *,
    is_open: bool,
    has_tools: bool = False,
    keep_whitespace: bool = False,
    force_nonempty_content: bool = False,
) -> tuple[str, str]:
    """Reasoning and answer of a whole text whose tags are characters."""
    splitter = ReasoningSplitter(
        is_open=is_open,
        tags_in_text=True,
        has_tools=has_tools,
        keep_whitespace=keep_whitespace,
        force_nonempty_content=force_nonempty_content,
    )
    spans = [*splitter.push(text), *splitter.finish()]
    answer = "".join(span.text for span in spans if not span.is_reasoning)
    return ("" if splitter.was_swapped else splitter.reasoning), answer


def partial_suffix(text: str, markers: Iterable[str]) -> int:
    """Length of the longest end of `text` that one of the markers may begin with, not whole."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if marker.startswith(text[-length:]):
                longest = length
                break
    return longest
