r"""The reasoning budget: an enforced limit on the tokens of reasoning, a state machine over ids.

A prompt can only ask a model to be brief. Here the tokens of reasoning are counted. After `budget`
of them the reasoning is closed at the next line end, and after `grace` more tokens in any case: the
tokens of the closing sequence are forced, and the model continues with its answer. With `grace` 0
the budget is exact, as vLLM's `thinking_token_budget` is. The grace is that of NVIDIA's own logits
processor; 500 is the model card's rule, "a line end within 500 tokens of the budget, else a hard
stop". The model card's client needs two calls for a hard stop, one with max_tokens = budget and one
that continues after ".\n</think>\n\n"; here one request suffices.

The sources leave these cases open; here they are decided as follows:

- **Reasoning shorter than the budget is unchanged**, to the last token. So is an answer without
  reasoning.
- **Every token that is generated while the reasoning is open counts**, also tags without effect and
  end tokens that are ignored. The tokens of the prompt do not count.
- **The bound**: at most budget + grace tokens of the model's own, then the closing sequence. Its
  tokens before `</think>` are shown as reasoning (one line end, or nothing; once for each block).
  None of it is counted: usage reports the model's own tokens between the tags.
- **The closing sequence is the chat style's** up to `</think>`: a line end and the tag for Nano and
  Super, the tag alone for Ultra and Lightning. The tokens after it are left to the model, whose
  next token may join that line end with others. If the reasoning already ends with a part of the
  sequence, or with a token that ends a line, only the rest is forced.
- **A budget of 0** closes at once: the prompt has opened the block and ended a line.
- **Reasoning that is opened again** (`<think>` before any answer) uses the rest of the same budget,
  and is closed at once if there is none. After text of an answer the tag is text.
- **An end token** inside the reasoning ends the answer as it would without a budget.
- **A tool call ends the reasoning** if the request has tools, by the rule of `text/reasoning.py`:
  `<tool_call>`, then `<function=`. A call that has begun is not cut in two: after `<tool_call>`
  up to `CALL_OPENING` tokens may follow, also beyond the bound.
"""

import codecs
import copy
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from nemotron3.errors import ConfigError
from nemotron3.text import ChatStyle, Tokenizer

CALL_OPENING = 8
"""Tokens after `<tool_call>` within which `<function=` must follow."""

_Decoder = codecs.getincrementaldecoder("utf-8")
_CALL_NEXT = "<function="


@dataclass(frozen=True, kw_only=True)
class BudgetIds:
    """The token ids that a budget needs, of a tokenizer and a chat style; made by `budget_ids`."""

    start: int
    """`<think>`."""
    closing: tuple[int, ...]
    """The tokens that close the reasoning; the last is `</think>`."""
    line_ends: frozenset[int]
    """Tokens whose text ends with a line end."""
    hidden: frozenset[int]
    """Special tokens other than tags; they are not text of an answer."""
    call_start: int
    """`<tool_call>`."""
    token_bytes: Callable[[int], bytes]
    """The bytes of an id."""

    @property
    def end(self) -> int:
        """`</think>`."""
        return self.closing[-1]


def budget_ids(tokenizer: Tokenizer, style: ChatStyle) -> BudgetIds:
    """The ids for a tokenizer and a chat style.

    It reads every entry of the vocabulary, so an engine calls it once. Raises ConfigError if the
    style's `reasoning_end` has no `</think>`.
    """
    closing = tokenizer.encode(style.reasoning_end)
    if tokenizer.think_end_id not in closing:
        raise ConfigError(
            f"reasoning_end is {style.reasoning_end!r}, which does not close the reasoning; "
            f"write </think> in it"
        )
    closing = closing[: closing.index(tokenizer.think_end_id) + 1]
    special = tokenizer.special_ids
    text = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in special}
    known = (
        tokenizer.think_start_id,
        tokenizer.think_end_id,
        tokenizer.tool_call_start_id,
        tokenizer.tool_call_end_id,
        tokenizer.tool_response_start_id,
        tokenizer.tool_response_end_id,
    )
    return BudgetIds(
        start=tokenizer.think_start_id,
        closing=tuple(closing),
        line_ends=frozenset(i for i, token in text.items() if token.endswith(b"\n")),
        hidden=special.difference(known),
        call_start=tokenizer.tool_call_start_id,
        token_bytes=tokenizer.token_bytes,
    )


class _State(Enum):
    OPEN = auto()
    PERHAPS_CALL = auto()  # open, after `<tool_call>`
    CLOSING = auto()
    CLOSED = auto()  # or never opened; no answer yet
    ANSWERED = auto()


class ThinkingBudget:
    """Counts the reasoning tokens of one answer and forces the closing sequence.

    `is_open` says whether the prompt ends within reasoning; `last_token` is the prompt's last token
    (None if it is known to end a line). Every token of the answer must be passed to `accept`, also
    forced ones.
    """

    def __init__(
        self,
        *,
        budget: int,
        grace: int,
        ids: BudgetIds,
        is_open: bool,
        has_tools: bool = False,
        last_token: int | None = None,
    ) -> None:
        self._budget = budget
        self._grace = grace
        self._ids = ids
        self._has_tools = has_tools
        self._state = _State.OPEN if is_open else _State.CLOSED
        self._recent: tuple[int, ...] = ()  # last tokens of this block, for `_num_produced`
        self._ends_line = last_token is None or last_token in (*ids.line_ends, ids.start)
        self._call = ""
        self._num_call_tokens = 0
        self._tail = b""  # bytes of an incomplete character
        self._next = 0  # index in the closing sequence
        self.num_reasoning_tokens = 0
        """Tokens that the model itself generated while reasoning was open."""
        self._close_if_due()

    @property
    def is_open(self) -> bool:
        """Whether the next token is part of the reasoning."""
        return self._state in (_State.OPEN, _State.PERHAPS_CALL, _State.CLOSING)

    def forced(self) -> int | None:
        """The token that must come next, or None."""
        return self._ids.closing[self._next] if self._state is _State.CLOSING else None

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen."""
        if self._state is _State.CLOSING:
            assert token == self.forced(), f"{token} came where {self.forced()} was forced"
            self._next += 1
            if token == self._ids.end:
                self._state = _State.CLOSED
        elif self._state is _State.CLOSED:
            if token == self._ids.start:
                self._state, self._recent, self._ends_line = _State.OPEN, (), True
                self._close_if_due()
            elif token != self._ids.end and self._text(token).strip():
                self._state = _State.ANSWERED
        elif self._state is not _State.ANSWERED:
            self._reason(token)

    def fork(self) -> "ThinkingBudget":
        """An independent copy, to look ahead along drafted tokens."""
        return copy.copy(self)  # its attributes are replaced, never changed in place

    def _reason(self, token: int) -> None:
        if token == self._ids.end:
            self._state = _State.CLOSED
            return
        self.num_reasoning_tokens += 1
        lead = len(self._ids.closing) - 1
        self._recent = (*self._recent, token)[-lead:] if lead else ()
        self._ends_line = token in self._ids.line_ends
        if self._state is _State.PERHAPS_CALL:
            self._look_for_call(token)
        is_call_start = self._has_tools and token == self._ids.call_start
        if is_call_start and self.num_reasoning_tokens <= self._budget + self._grace:
            self._state, self._call, self._num_call_tokens = _State.PERHAPS_CALL, "", 0
        self._close_if_due()

    def _look_for_call(self, token: int) -> None:
        self._num_call_tokens += 1
        self._call = (self._call + self._text(token)).lstrip()
        if self._call.startswith(_CALL_NEXT):
            self._state = _State.ANSWERED
        elif not _CALL_NEXT.startswith(self._call) or self._num_call_tokens >= CALL_OPENING:
            self._state = _State.OPEN

    def _text(self, token: int) -> str:
        if token in self._ids.hidden:
            return ""
        decoder = _Decoder(errors="replace")
        text = decoder.decode(self._tail + self._ids.token_bytes(token))
        self._tail = decoder.getstate()[0]
        return text

    def _close_if_due(self) -> None:
        if self._state is not _State.OPEN or self.num_reasoning_tokens < self._budget:
            return
        if self._ends_line or self.num_reasoning_tokens >= self._budget + self._grace:
            self._state = _State.CLOSING
            self._next = self._num_produced()

    def _num_produced(self) -> int:
        lead = self._ids.closing[:-1]
        if self._ends_line and set(lead) <= self._ids.line_ends:
            return len(lead)
        sizes = range(len(lead), 0, -1)
        return next((n for n in sizes if self._recent[-n:] == lead[:n]), 0)
