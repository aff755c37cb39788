"""Incremental decoding of token ids to text, without incomplete characters.

A byte-level token may end in the middle of a UTF-8 sequence; its bytes are buffered until the rest
arrives. The concatenated pieces equal the result of decoding all ids at once: bytes that cannot
become a character are U+FFFD in both. The usual way, decoding everything again for each token and
cutting off the text already returned, is quadratic, and returns U+FFFD for characters that are only
incomplete.
"""

import codecs
from collections.abc import Iterable

from nemotron3.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Decodes one stream of ids; one object per stream."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = _Utf8Decoder("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; returns the text that they complete, which may be empty."""
        spelled = [self._tokenizer.token_bytes(i) for i in ids if i not in self._skipped]
        return self._decoder.decode(b"".join(spelled))

    def finish(self) -> str:
        """End the stream; returns U+FFFD for a character that is still incomplete."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
