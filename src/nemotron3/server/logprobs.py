"""Log-probabilities in the shapes of the three endpoints that report them.

A token is shown as the text that it stands for. Bytes that are no whole character by themselves
become the replacement sign in that text, and stand unharmed in `bytes`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from nemotron3.inference.requests import TokenLogprob
from nemotron3.text import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token stands for, by itself."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat, and `logprobs` of an output text."""
    return [
        {
            **_entry(tokenizer, logprob.token, logprob.logprob),
            "top_logprobs": [_entry(tokenizer, token, value) for token, value in logprob.top],
        }
        for logprob in logprobs
    ]


def completion_logprobs(
    tokenizer: Tokenizer,
    logprobs: Sequence[TokenLogprob | None],
    *,
    start: int = 0,
    first: int | None = None,
) -> dict[str, Any]:
    """`logprobs` of a completion; `start` is where its first token stands in the text.

    The first token of a prompt has no log-probability: null, for the token `first`.
    """
    texts: list[str] = []
    offsets: list[int] = []
    for logprob in logprobs:
        token = first if logprob is None else logprob.token
        texts.append("" if token is None else token_text(tokenizer, token))
        offsets.append(start)
        start += len(texts[-1])
    return {
        "tokens": texts,
        "token_logprobs": [None if each is None else each.logprob for each in logprobs],
        "top_logprobs": [None if each is None else _top(tokenizer, each) for each in logprobs],
        "text_offset": offsets,
    }


def _top(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, float]:
    # The token itself is always there, whether it is among the most probable or not.
    shown = (*logprob.top, (logprob.token, logprob.logprob))
    return {token_text(tokenizer, token): value for token, value in shown}


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob | None]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token a map of ids; null for the first."""
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
