r"""An enforced limit on the tokens of reasoning, as a state machine over token ids.

A hint in the prompt asks a model to be brief; this makes it. While reasoning is open its tokens are
counted. Once `budget` of them have come, the reasoning is closed at the first line end, and `grace`
tokens later wherever it is: the closing sequence is forced, token by token, and the model goes on
to its answer from what it has thought. With `grace` 0 the budget is exact, as vLLM's
`thinking_token_budget` is. A grace is the rule of NVIDIA's own logits processor; one of 500 is the
model card's, "a line end within 500 tokens of the budget, else a hard stop". The model card's
client gets a hard cut by two calls, one with max_tokens = budget, one that continues after
".\n</think>\n\n"; nothing needs to be sent twice here.

Decided here, because the sources leave it open:

- **Reasoning shorter than the budget is untouched**, to the last token. So is an answer that never
  opens any, whatever the budget.
- **What counts** is every token generated while the reasoning is open, tags that change nothing
  and end tokens (where those are ignored) included. The prompt's own tokens do not count.
- **The bound**: at most budget + grace tokens of the model's own, then the closing sequence, of
  which all but `</think>` is shown as reasoning (one line end, or nothing; once for each block),
  and none is counted: usage reports the model's own tokens between the tags.
- **The closing sequence is what the chat style writes** up to `</think>`: a line end and the tag
  for Nano and Super, the tag alone for Ultra and Lightning. What follows is left to the model,
  whose next token may join that line end with others. Where the reasoning already ends with a part
  of the sequence, or with a token that ends a line, the rest completes it.
- **A budget of 0** closes at once: the prompt has opened the block and ended a line.
- **Reasoning that is opened again** (`<think>` before any answer) spends what is left of the same
  budget, and is closed at once where nothing is. After text of an answer the tag is text.
- **An end token** inside the reasoning ends the answer as it would without a budget.
- **A call ends the reasoning** where tools are offered, as `text/reasoning.py` reads it:
  `<tool_call>`, then `<function=`. A call that has begun is not cut in two: `CALL_OPENING` tokens
  are waited for it to show itself, and they may be beyond the bound.
"""

import codecs
import copy
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from nemotron3.errors import ConfigError
from nemotron3.text import ChatStyle, Tokenizer

CALL_OPENING = 8
"""Most tokens that are waited for after `<tool_call>`, for `<function=` to come."""

_Decoder = codecs.getincrementaldecoder("utf-8")
_CALL_NEXT = "<function="


@dataclass(frozen=True, kw_only=True)
class BudgetIds:
    """What the budget has to know of a vocabulary and a chat style; made once (`budget_ids`)."""

    start: int
    """`<think>`."""
    closing: tuple[int, ...]
    """What closes the reasoning; its last is `</think>`."""
    line_ends: frozenset[int]
    """Tokens whose text ends with a line end."""
    hidden: frozenset[int]
    """Special tokens that are no text of an answer and no tags."""
    call_start: int
    """`<tool_call>`."""
    token_bytes: Callable[[int], bytes]
    """The text of an id; asked for where an answer or a call may begin."""

    @property
    def end(self) -> int:
        """`</think>`."""
        return self.closing[-1]


def budget_ids(tokenizer: Tokenizer, style: ChatStyle) -> BudgetIds:
    """The ids for a tokenizer and what its chat style writes after reasoning.

    It looks at every entry of the vocabulary, so an engine does it once.
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
    """Counts the reasoning of one answer and says which token has to come, where one has to.

    `is_open` is whether the prompt leaves reasoning open, `last_token` the prompt's last token
    (None takes the template's word that a line has ended). Every token of the answer is reported
    through `accept`, the forced ones too.
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
        self._recent: tuple[int, ...] = ()  # of this block, no more than could begin the closing
        self._ends_line = last_token is None or last_token in (*ids.line_ends, ids.start)
        self._call = ""
        self._num_call_tokens = 0
        self._tail = b""  # of a character that is not whole yet
        self._next = 0  # of the closing sequence
        self.num_reasoning_tokens = 0
        """Tokens that the model itself generated while reasoning was open."""
        self._close_if_due()

    @property
    def is_open(self) -> bool:
        """Whether the next token is part of the reasoning."""
        return self._state in (_State.OPEN, _State.PERHAPS_CALL, _State.CLOSING)

    def forced(self) -> int | None:
        """The token that has to come, where one has to."""
        return self._ids.closing[self._next] if self._state is _State.CLOSING else None

    def accept(self, token: int) -> None:
        """Take the token that came."""
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
        return copy.copy(self)  # nothing in it is changed in place

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
