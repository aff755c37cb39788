"""Conversations as token ids with a loss mask, and the samples that teach control of reasoning.

The reports turn some conversations with reasoning into three other kinds of samples (reports,
sections on supervised fine-tuning):

* without reasoning, for thinking turned off: 10% for Nano, 3% for Super;
* with a hint that asks for little effort, where the reasoning is short: 2% for Super;
* with the reasoning cut at a random budget and the answer kept, so that the model can answer after
  the engine ends its reasoning: 3% for Nano, and 12% in a separate stage for Super. The `</think>`
  there is not a target (Ultra), or the model would learn to stop early.

The kind of a conversation follows from the seed and its index in its source, so it is the same in
every run and every epoch.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nemotron3.data.conversations import Conversation
from nemotron3.errors import ConfigError, DataError, Nemotron3Error
from nemotron3.text import ChatTemplate, Tokenizer
from nemotron3.text.messages import AssistantMessage, Message
from nemotron3.text.vocabulary import (
    IM_END,
    IM_START,
    THINK_END,
    THINK_START,
    TOOL_CALL_END,
    TOOL_CALL_START,
    TOOL_RESPONSE_END,
    TOOL_RESPONSE_START,
)

_CHAT_TOKENS = (IM_START, IM_END, THINK_START, THINK_END)
_TOOL_TOKENS = (TOOL_CALL_START, TOOL_CALL_END, TOOL_RESPONSE_START, TOOL_RESPONSE_END)


@dataclass(frozen=True, kw_only=True)
class ReasoningControlConfig:
    """Shares of the conversations with reasoning that are turned into samples of another kind."""

    strip_fraction: float = 0.0
    """Share whose reasoning is removed."""
    truncate_fraction: float = 0.0
    """Share whose reasoning is cut at a random number of tokens."""
    effort_fraction: float = 0.0
    """Share of the conversations with short reasoning that get the hint for `effort`."""
    effort: str = "low"
    """An effort of the model's chat template."""
    effort_tokens: int = 64
    """Most tokens of short reasoning."""

    def __post_init__(self) -> None:
        for name in ("strip_fraction", "truncate_fraction", "effort_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"is {getattr(self, name)}; it must be from 0 to 1",
                    field=f"reasoning.{name}",
                )
        total = self.strip_fraction + self.truncate_fraction + self.effort_fraction
        if total > 1:
            raise ConfigError(
                f"the fractions of reasoning sum to {total:g}; they must sum to at most 1, since a "
                "conversation becomes one kind of sample"
            )


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """Token ids of a conversation and a mask of the targets; it ends with the last target."""

    ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of input tokens: all but the last, which is only a target."""
        return len(self.ids) - 1


def check_chat_tokens(tokenizer: Tokenizer, *, with_tools: bool) -> None:
    """Raise ConfigError for a vocabulary without the tokens of the chat template."""
    wanted = _CHAT_TOKENS + (_TOOL_TOKENS if with_tools else ())
    missing = [token for token in wanted if tokenizer.token_to_id(token) is None]
    if missing:
        raise ConfigError(
            f"the model's vocabulary lacks {', '.join(missing)}, which the chat template writes; "
            "take a model whose tokenizer has the special tokens of Nemotron 3"
        )


def tokenize_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    control: ReasoningControlConfig | None = None,
    *,
    seed: int = 0,
) -> Iterator[TokenizedConversation]:
    """Render and tokenize each conversation. Raises DataError for one that the template refuses."""
    control = control or ReasoningControlConfig()
    for index, conversation in enumerate(conversations):
        messages, effort = _controlled(
            conversation, control, tokenizer, chance=random.Random(f"reasoning {seed} {index}")
        )
        try:
            rendered = template.render(
                messages, tools=conversation.tools, effort=effort, add_generation_prompt=False
            )
        except Nemotron3Error as error:
            raise DataError(f"{conversation.place}: {error}") from error
        tokens = rendered.tokens(tokenizer)
        is_target = np.array(tokens.loss_mask, dtype=np.bool_)
        end = int(np.flatnonzero(is_target)[-1]) + 1  # every answer has an end token
        yield TokenizedConversation(np.array(tokens.ids[:end], np.int32), is_target[:end])


def _controlled(
    conversation: Conversation,
    control: ReasoningControlConfig,
    tokenizer: Tokenizer,
    *,
    chance: random.Random,
) -> tuple[list[Message], str | None]:
    """The messages and the effort of the sample that is made from this conversation."""
    messages = [with_reasoning_apart(message) for message in conversation.messages]
    effort, draw = conversation.effort, chance.random()
    places = [i for i, message in enumerate(messages) if _reasoning(message)]
    if not places or effort is not None:
        return messages, effort
    if draw < control.strip_fraction:
        return [_replaced(message, reasoning=None) for message in messages], None
    draw -= control.strip_fraction
    if draw < control.truncate_fraction:
        ids = tokenizer.encode(_reasoning(messages[places[-1]]), parse_special=False)
        if len(ids) > 1:
            budget = chance.randrange(1, len(ids))
            cut = tokenizer.decode(ids[:budget]).removesuffix("\N{REPLACEMENT CHARACTER}")
            messages[places[-1]] = _replaced(
                messages[places[-1]], reasoning=cut, is_reasoning_cut=True
            )
        return messages, None
    draw -= control.truncate_fraction
    if draw < control.effort_fraction:
        longest = max(
            len(tokenizer.encode(_reasoning(messages[place]), parse_special=False))
            for place in places
        )
        effort = control.effort if longest <= control.effort_tokens else None
    return messages, effort


def with_reasoning_apart(message: Message) -> Message:
    """Move reasoning from tags at the start of the content to the message's own field."""
    if not isinstance(message, AssistantMessage) or message.reasoning is not None:
        return message
    inside, end, answer = message.content.lstrip().partition(THINK_END)
    if not end or not inside.startswith(THINK_START):
        return message
    return replace(
        message, reasoning=inside.removeprefix(THINK_START).strip("\n"), content=answer.lstrip("\n")
    )


def _reasoning(message: Message) -> str:
    text = message.reasoning if isinstance(message, AssistantMessage) else None
    return text if text is not None and text.strip() else ""


def _replaced(message: Message, **changes: object) -> Message:
    return replace(message, **changes) if isinstance(message, AssistantMessage) else message
