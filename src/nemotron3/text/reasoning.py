r"""Separate a model's reasoning from its answer while the tokens arrive.

The rules are those of the family's own parsers (DeepSeek-R1's): if the prompt opened a `<think>`
block, the output is reasoning until `</think>`; if not, all output is answer, unless the model
opens a block itself. This module decides the cases that these rules leave open:

- **A tag is a token.** If ids are known, `</think>` closes the reasoning only as the special token;
  a model that writes the eight characters is writing about the tag. Without ids (`tags_in_text`)
  the characters count as the tag, even if the stream splits them.
- **A tag counts at the edge of a section.** `<think>` before any reasoning repeats the prompt, and
  `</think>` before any answer repeats the closing tag: both are dropped. `<think>` before any
  answer opens the reasoning again. Anywhere else they are text, so no part of an answer is lost.
- **A call ends the reasoning** if tools were offered: models omit `</think>` before `<tool_call>`
  in some percent of their calls (TensorRT-LLM #13684). It must look like a call (`<tool_call>`,
  then `<function=`); reasoning that only mentions the tag continues.
- **Reasoning that is never closed** has no answer: all output is reasoning and the answer is empty.
  With `force_nonempty_content` the reasoning is returned as the answer.

White space around the sections belongs to the template and is dropped: at both ends of the
reasoning, and at the start of an answer that follows it (`keep_whitespace` keeps all of it).

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
"""The tags that separate reasoning, answer and calls."""
CALL_TAGS = (TOOL_CALL_END, TOOL_RESPONSE_START, TOOL_RESPONSE_END)
"""Tags that this module passes on, marked as tags, to the parser of the answer."""

_ANY_TAG = re.compile("|".join(TAGS))
_CALL_NEXT = "<function="


@dataclass(frozen=True)
class Span:
    """Text of one section; `is_tag` marks a special token of calls."""

    text: str
    is_reasoning: bool
    is_tag: bool = False


class _State(Enum):
    REASONING = auto()
    PERHAPS_CALL = auto()  # inside the reasoning, after `<tool_call>`
    ANSWER = auto()


class ReasoningSplitter:
    """Splits one stream; one object per answer.

    `is_open`: whether the prompt left a `<think>` block open (`RenderedChat.is_reasoning_open`).
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
        """Whether the next token belongs to the reasoning, as far as is known."""
        return self._state is not _State.ANSWER

    @property
    def is_undecided(self) -> bool:
        """Whether the end of the text may still turn out to be a tag or a call."""
        return self._state is _State.PERHAPS_CALL or bool(self._unread)

    @property
    def is_steady(self) -> bool:
        """Whether the section, and the white space that it drops, are the same for all text until
        the next special token."""
        if self._tags_in_text or self._state is _State.PERHAPS_CALL:
            return False
        return self.is_reasoning_open or self._has_answer or not self._strips_answer

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._reasoning)

    def push(self, text: str) -> list[Span]:
        """Add a piece of text; returns the text whose section is certain."""
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
        """Add a special token, one of `TAGS` and `CALL_TAGS`."""
        assert tag in (*TAGS, *CALL_TAGS), f"{tag} is text to the splitter"
        self._tag(tag)
        return self._take()

    def finish(self) -> list[Span]:
        """End the stream; returns the buffered text and, with `force_nonempty_content`, the swap.

        With a swap the reasoning is returned a second time, as the answer. A caller that sends one
        message instead of a stream omits the first (`was_swapped`).
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
        """After the end of the stream: whether the reasoning was returned as the answer."""
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
    """Split a complete text, whose tags are characters, into reasoning and answer."""
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
    """Length of the longest suffix of `text` that is a proper prefix of one of the markers."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if marker.startswith(text[-length:]):
                longest = length
                break
    return longest
