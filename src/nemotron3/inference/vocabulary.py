"""What the engine asks of a tokenizer: ids and the bytes behind them, never text of its own.

`nemotron3.text.Tokenizer` is one. This package does not import it, so that a model with another
tokenizer can be run by whoever writes these few names for it.
"""

from typing import Protocol


class Vocabulary(Protocol):
    """The ids of the family's special tokens, and the bytes of all others."""

    @property
    def vocab_size(self) -> int:
        """Number of entries; the model may have more rows, which stand for nothing."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Entries that are no text."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a document or a turn."""
        ...

    @property
    def think_start_id(self) -> int:
        """`<think>`."""
        ...

    @property
    def think_end_id(self) -> int:
        """`</think>`."""
        ...

    @property
    def tool_call_start_id(self) -> int:
        """`<tool_call>`."""
        ...

    @property
    def tool_call_end_id(self) -> int:
        """`</tool_call>`."""
        ...

    @property
    def tool_response_start_id(self) -> int:
        """`<tool_response>`."""
        ...

    @property
    def tool_response_end_id(self) -> int:
        """`</tool_response>`."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text behind an id."""
        ...

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        ...


class ReasoningStyle(Protocol):
    """What the engine asks of a chat style (`nemotron3.text.chat_style.ChatStyle` is one)."""

    @property
    def reasoning_end(self) -> str:
        """What the template writes between reasoning and answer, `</think>` in it."""
        ...
