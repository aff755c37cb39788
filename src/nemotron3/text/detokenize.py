"""Token ids to text, one by one, without ever showing half a character.

A byte-level token may end in the middle of a UTF-8 sequence; its bytes wait here until the rest
has come. The pieces that come out, joined, are what decoding all ids at once gives: bytes that
can never become a character are U+FFFD there and here. Decoding the whole again for every token
and cutting off what was shown before (the usual way) is quadratic, and shows U+FFFD where a
character is merely incomplete.
"""

import codecs
from collections.abc import Iterable

from nemotron3.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one stream of ids; one object per stream."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; it may be empty."""
        spelled = [self._tokenizer.token_bytes(i) for i in ids if i not in self._skipped]
        return self._decoder.decode(b"".join(spelled))

    def finish(self) -> str:
        """What the end of the stream reveals: U+FFFD for a character that never came whole."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
