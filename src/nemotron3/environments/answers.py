r"""Answers: reading the one in `\boxed{}`, a number, a single choice; and writing demonstrations.

A reader gives None unless there is exactly one thing to read. An answer that names every option,
or repeats boxes until one is right, is thereby no answer.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from nemotron3.text import AssistantMessage, ToolCall

MAX_ANSWER = 20_000
"""Characters that are read of an answer; a longer one is no answer."""
EXPLAINED_FROM = 0.5
"""The difficulty from which prompts say in which form the answer is wanted."""

_BOXED = r"\boxed{"
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,18})(?:\.\d{1,18})?", re.ASCII)
_FRACTION = re.compile(r"([-+]?\d{1,18})/(\d{1,18})", re.ASCII)


def boxed(text: str) -> str | None:
    r"""What stands in the one `\boxed{...}` of a text; None for none, several or an open one."""
    if len(text) > MAX_ANSWER or text.count(_BOXED) != 1:
        return None
    inside = text.split(_BOXED)[1]
    depth = 1
    for i, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:i].strip()
    return None


def number(text: str) -> Fraction | None:
    """The number that a text is: 12, -3, 1,234, 0.5 or 3/4 (and nothing else)."""
    text = text.strip()
    fraction = _FRACTION.fullmatch(text)
    if fraction and int(fraction[2]):
        return Fraction(int(fraction[1]), int(fraction[2]))
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def choice(text: str, letters: Sequence[str]) -> str | None:
    r"""The one letter that a text is: `B`, `(B)`, `B.`, `B)` or that in a `\boxed{}`."""
    inside = boxed(text)
    said = (text if inside is None and _BOXED not in text else inside or "").strip()
    match = re.fullmatch(r"\(?([A-Z])[.)]?", said)
    return match[1] if match and match[1] in letters else None


def with_format(prompt: str, how: str, difficulty: float) -> str:
    """The prompt, and how to answer it.

    Easy tasks are for small models, whose demonstrations show the form and whose prompts must be
    short; from `EXPLAINED_FROM` on the form is said, as a model needs that has seen none.
    """
    return f"{prompt}\n{how}" if difficulty >= EXPLAINED_FROM else prompt


def answer_turn(content: str, reasoning: str) -> AssistantMessage:
    """The turn of a demonstration that answers."""
    return AssistantMessage(content=content, reasoning=reasoning)


def call_turns(
    calls: Sequence[tuple[str, Mapping[str, Any]]], reasoning: Sequence[str]
) -> list[AssistantMessage]:
    """Turns of a demonstration that make one call each."""
    return [
        AssistantMessage(
            reasoning=thought, tool_calls=(ToolCall(name=name, arguments=given, id=f"call_{i}"),)
        )
        for i, ((name, given), thought) in enumerate(zip(calls, reasoning, strict=True))
    ]
