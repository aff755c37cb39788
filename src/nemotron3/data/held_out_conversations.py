"""Which conversations are held out: a choice by their content, so that equal ones are on one side.

Sources often share conversations. What one of them holds out, none trains on, and what differs only
in what a reader cannot see (ids of calls, which messages are trained, tags around reasoning) is the
same conversation. The choice depends on the seed and the content alone, not on names and order.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from nemotron3.data.chat_tokens import with_reasoning_apart
from nemotron3.data.conversations import Conversation
from nemotron3.errors import DataError
from nemotron3.text.messages import AssistantMessage, Message

Content = bytes
"""What tells a conversation from others."""


def content_of(conversation: Conversation) -> Content:
    """The same for conversations that read alike."""
    tools = [
        (tool.name, tool.description, tool.parameters, tool.extra) for tool in conversation.tools
    ]
    messages = [_read(message) for message in conversation.messages]
    text = json.dumps([messages, tools], sort_keys=True, default=dict)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def choose_held_out(
    sources: Mapping[str, Sequence[Conversation]],
    *,
    fraction: float,
    most: int,
    seed: int,
    fits: Callable[[Conversation], bool],
) -> set[Content]:
    """What is held out of all sources: of each, a fraction of its different conversations.

    That is one at least and `most` at most, of those that `fits`. Raises DataError for a source
    with fewer than two.
    """
    chosen: set[Content] = set()
    for title, rows in sources.items():
        different = {content_of(row): row for row in rows}
        if len(different) < 2:
            raise DataError(
                f"{title} has {len(different)} different conversations; training needs two or "
                "more, since one is held out"
            )
        count = min(most, max(1, round(fraction * len(different))))
        own = 0
        for content in sorted(different, key=lambda content: _place(content, seed)):
            if own == count:
                break
            if fits(different[content]):
                chosen.add(content)
                own += 1
    return chosen


def without(
    sources: Mapping[str, Sequence[Conversation]], held_out: set[Content]
) -> dict[str, list[Conversation]]:
    """The conversations to train on. Raises DataError for a source that has none left."""
    kept = {
        title: [row for row in rows if content_of(row) not in held_out]
        for title, rows in sources.items()
    }
    if empty := [title for title, rows in kept.items() if not rows]:
        raise DataError(
            f"all {len(sources[empty[0]])} conversations of {empty[0]} are held out, by it or by "
            "other sources; leave it out, or hold out others"
        )
    return kept


def _place(content: Content, seed: int) -> bytes:
    return hashlib.blake2b(content, digest_size=16, salt=seed.to_bytes(16, "little")).digest()


def _read(message: Message) -> tuple[object, ...]:
    message = with_reasoning_apart(message)
    kind = type(message).__name__
    if not isinstance(message, AssistantMessage):
        return kind, message.content
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return kind, message.content, (message.reasoning or "").strip(), calls
