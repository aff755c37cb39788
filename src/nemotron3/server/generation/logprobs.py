"""Log-probabilities in the formats of the endpoints that report them.

A token is shown as its text. Bytes that are not a whole character become the replacement character
in the text, and are exact in `bytes`. Completions identify a token by its text alone, so they write
such bytes out (`bytes:\\xf0\\x9f`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from nemotron3.inference.requests import TokenLogprob
from nemotron3.text import IncrementalDetokenizer, Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a single token."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], *, by_id: bool = False
) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat, and `logprobs` of an output text of responses.

    `by_id` writes vLLM's `token_id:42` for the text of a token.
    """

    def entry(token: int, value: float) -> dict[str, Any]:
        named = {"token": f"token_id:{token}"} if by_id else {}
        return _entry(tokenizer, token, value) | named

    return [
        {
            **entry(logprob.token, logprob.logprob),
            "top_logprobs": [entry(token, value) for token, value in logprob.top],
        }
        for logprob in logprobs
    ]


class CompletionLogprobs:
    """`logprobs` of one completion, delta by delta; those of the prompt first if it is echoed.

    The offset of a token is that of the first character that it is a part of. A special token of
    the answer is not shown and has the offset of the next token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._answer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
        self._length = 0  # characters of the text so far

    def of_prompt(
        self, prompt: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        """Log-probabilities of the prompt; the first token has none."""
        text = IncrementalDetokenizer(self._tokenizer)
        shown = self._shown(text, prompt, logprobs)
        self._length += len(text.finish())
        return shown

    def of_answer(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities of the next tokens of the answer."""
        return self._shown(self._answer, [each.token for each in logprobs], logprobs)

    def _shown(
        self,
        text: IncrementalDetokenizer,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
    ) -> dict[str, Any]:
        offsets: list[int] = []
        for token in tokens:
            before = self._length
            self._length += len(text.push([token]))
            # The text of this token may begin with earlier bytes that completed no character.
            own = _whole(self._tokenizer.token_bytes(token))
            offsets.append(max(before, self._length - len(own)) if own else before)
        return {
            "tokens": [self._spelled(token) for token in tokens],
            "token_logprobs": [None if each is None else each.logprob for each in logprobs],
            "top_logprobs": [None if each is None else self._top(each) for each in logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        # The sampled token is always listed, even if it is not among the most probable.
        shown = (*logprob.top, (logprob.token, logprob.logprob))
        return {self._spelled(token): value for token, value in shown}

    def _spelled(self, token: int) -> str:
        spelled = self._tokenizer.token_bytes(token)
        text = _whole(spelled)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled) if text is None else text


def _whole(spelled: bytes) -> str | None:
    """The text of bytes, or None if they are not whole characters."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return None


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob | None]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: a map by token id for each token; null for the first."""
    return [None if each is None else _by_id(tokenizer, each) for each in logprobs]


def _by_id(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, Any]:
    ranked = [(token, value, rank) for rank, (token, value) in enumerate(logprob.top, start=1)]
    shown = {token: (value, rank) for token, value, rank in ranked}
    shown[logprob.token] = (logprob.logprob, logprob.rank)
    return {
        str(token): {
            "logprob": value,
            "rank": rank,
            "decoded_token": token_text(tokenizer, token),
        }
        for token, (value, rank) in shown.items()
    }


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token)),
    }
