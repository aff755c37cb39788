"""Stop strings, matched across tokens, and the tokens that can be streamed while one may match.

A stop string may begin in one token and end in another, so text that may be its beginning is held
back until later tokens decide. The engine has one `StopStrings` to find the end of an answer. The
output processor has another, with the same tokens, to find the tokens to show.

Special tokens are not text. In a text completion they are skipped, and the text on both sides of
one is contiguous. In a chat they separate what is shown (reasoning from content), and no string
matches across them. A stop string that contains the text of a special token, such as `</think>`,
matches that token.
"""

from collections import deque
from collections.abc import Iterable

from nemotron3.inference.requests import SamplingParams
from nemotron3.text import IncrementalDetokenizer, Tokenizer
from nemotron3.text.reasoning import partial_suffix

_BREAK = "\ud800"
"""An unpaired surrogate, which occurs in no text."""


class StopStrings:
    """The stop strings of one answer, matched token by token."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, is_chat: bool) -> None:
        self._strings = {string: string for string in params.stop}
        """The strings as they are searched, and as they were given."""
        self._marks: dict[int, str] = {}  # a character for each special token of a chat
        if is_chat and self._strings:
            self._marks = dict.fromkeys(tokenizer.special_ids, _BREAK)
            spelled = {token: tokenizer.token_bytes(token).decode() for token in self._marks}
            wanted = [t for t, s in spelled.items() if any(s in string for string in params.stop)]
            for place, token in enumerate(sorted(wanted), start=ord(_BREAK) + 1):
                self._marks[token] = chr(place)  # one character, so that no part of it matches
                self._strings = {
                    searched.replace(spelled[token], chr(place)): string
                    for searched, string in self._strings.items()
                }
        self._keeps_match = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
        self._text = ""  # of the tokens that are held back
        self._held: deque[tuple[int, int]] = deque()  # token, and its end in the text
        self._incomplete: list[int] = []  # tokens that end within a character
        self._num_tokens = 0
        self._cut = 0
        self.matched: str | None = None
        """The string that ended the answer."""
        self.rest = ""
        """Text to show of the token in which it began (or ended, if it is kept)."""

    def ends_at(self, token: int) -> bool:
        """Advance by the next token; returns whether the answer ends with it."""
        self.push([token])
        return self.matched is not None

    def push(self, tokens: Iterable[int]) -> list[int]:
        """Advance by tokens; returns those that are certain to be part of the answer."""
        if not self._strings:
            return list(tokens)
        certain: list[int] = []
        for token in tokens:
            if self.matched is not None:
                break
            self._num_tokens += 1
            before = len(self._text)
            mark = self._marks.get(token)
            if mark is None:
                self._text += self._detokenizer.push([token])
            else:
                self._text += self._detokenizer.finish() + mark
            self._incomplete.append(token)
            if len(self._text) > before:  # else its bytes are a part of a character
                self._held += [(part, len(self._text)) for part in self._incomplete]
                self._incomplete = []
            self._search(before)
            keep = len(self._text) - partial_suffix(self._text, self._strings)
            certain += self._release(keep if self.matched is None else self._cut)
        return certain

    def finish(self) -> list[int]:
        """End the answer; returns the tokens that are still held back, unless a string matched."""
        if self.matched is not None:
            return []
        incomplete, self._incomplete = self._incomplete, []
        return self._release(len(self._text)) + incomplete

    def _search(self, before: int) -> None:
        if self._num_tokens < self._min_tokens:
            return
        found: list[tuple[int, str]] = []
        for string in self._strings:
            # A match ends in the newest token, or it would have been found before.
            start = self._text.find(string, max(before - len(string) + 1, 0))
            if start >= 0:
                found.append((start, string))
        if found:
            start, string = min(found)
            self.matched = self._strings[string]
            self._cut = start + (len(string) if self._keeps_match else 0)

    def _release(self, end: int) -> list[int]:
        """Return the tokens whose text ends at `end` or before."""
        certain: list[int] = []
        shown = 0
        while self._held and self._held[0][1] <= end:
            token, shown = self._held.popleft()
            certain.append(token)
        self._text = self._text[shown:]
        self._held = deque((token, at - shown) for token, at in self._held)
        if self.matched is not None:
            self.rest = self._text[: end - shown]
        return certain
