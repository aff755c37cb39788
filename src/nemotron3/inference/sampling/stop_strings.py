"""Strings that end an answer, found across tokens, and what of the tokens before them is certain.

A string may begin in one token and end in another, so text that may be its beginning is held back
until the next tokens decide. The engine asks one of these whether to stop; whoever shows the answer
asks another one, fed with the same tokens, what to show.

Special tokens are no text. Of a text to continue they are left out, and what stands before and
after one is shown in one piece; in a chat they part what is shown (reasoning from content), and no
string is found across them. One that a string spells out, as `</think>`, is found where it stands.
"""

from collections import deque
from collections.abc import Iterable

from nemotron3.inference.requests import SamplingParams
from nemotron3.text import IncrementalDetokenizer, Tokenizer
from nemotron3.text.reasoning import partial_suffix

_BREAK = "\ud800"
"""Half of a character, which no text has."""


class StopStrings:
    """Follows one answer."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, is_chat: bool) -> None:
        self._strings = {string: string for string in params.stop}
        """As they are searched, and as they were given."""
        self._marks: dict[int, str] = {}  # what stands for the special tokens of a chat
        if is_chat and self._strings:
            self._marks = dict.fromkeys(tokenizer.special_ids, _BREAK)
            spelled = {token: tokenizer.token_bytes(token).decode() for token in self._marks}
            wanted = [t for t, s in spelled.items() if any(s in string for string in params.stop)]
            for place, token in enumerate(sorted(wanted), start=ord(_BREAK) + 1):
                self._marks[token] = chr(place)  # one character, so that no part of it is found
                self._strings = {
                    searched.replace(spelled[token], chr(place)): string
                    for searched, string in self._strings.items()
                }
        self._keeps_match = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
        self._text = ""  # of the held tokens
        self._held: deque[tuple[int, int]] = deque()  # token, and where in the text it ends
        self._unheard: list[int] = []  # tokens whose text has not come
        self._num_tokens = 0
        self._cut = 0
        self.matched: str | None = None
        """The string that ended the answer."""
        self.rest = ""
        """Text to show of the token in which it began (or ended, where it is kept)."""

    def ends_at(self, token: int) -> bool:
        """Take the next token; whether the answer ends with it."""
        self.push([token])
        return self.matched is not None

    def push(self, tokens: Iterable[int]) -> list[int]:
        """Take tokens; returns those that are certain to be part of the answer."""
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
            self._unheard.append(token)
            if len(self._text) > before:  # else its bytes are a part of a character
                self._held += [(part, len(self._text)) for part in self._unheard]
                self._unheard = []
            self._search(before)
            keep = len(self._text) - partial_suffix(self._text, self._strings)
            certain += self._release(keep if self.matched is None else self._cut)
        return certain

    def finish(self) -> list[int]:
        """End the answer; returns the tokens that were held back in vain."""
        if self.matched is not None:
            return []
        unheard, self._unheard = self._unheard, []
        return self._release(len(self._text)) + unheard

    def _search(self, before: int) -> None:
        if self._num_tokens < self._min_tokens:
            return
        found: list[tuple[int, str]] = []
        for string in self._strings:
            # It ends in the newest token, or it would have been found before.
            start = self._text.find(string, max(before - len(string) + 1, 0))
            if start >= 0:
                found.append((start, string))
        if found:
            start, string = min(found)
            self.matched = self._strings[string]
            self._cut = start + (len(string) if self._keeps_match else 0)

    def _release(self, end: int) -> list[int]:
        """Let go of the tokens whose text ends by then."""
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
