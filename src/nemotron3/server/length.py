"""Whether a request fits the model's context, before anything runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from nemotron3.server.errors import APIError, invalid_request

_MAX_BYTES_PER_TOKEN = 256
"""No entry of a vocabulary stands for more text, but for runs of blanks and signs."""


def assert_not_hopeless(texts: Iterable[str], max_model_len: int, where: str) -> None:
    """Refuse what cannot fit whatever its tokens are, without the time to cut it into tokens."""
    characters = sum(len(text) for text in texts)
    if characters > _MAX_BYTES_PER_TOKEN * max_model_len:
        raise _too_long(f"{where} has {characters:,} characters", max_model_len, where)


def assert_fits(
    num_tokens: int, max_tokens: int | None, max_model_len: int, where: str, max_tokens_name: str
) -> None:
    """Refuse a prompt that leaves no room, and a limit of the answer beyond the context."""
    if num_tokens == 0:
        raise invalid_request(f"{where} has no tokens; give at least one", where)
    if num_tokens >= max_model_len:
        raise _too_long(f"{where} has {num_tokens:,} tokens", max_model_len, where)
    if max_tokens is not None and num_tokens + max_tokens > max_model_len:
        raise invalid_request(
            f"{max_tokens_name} is {max_tokens:,} and {where} has {num_tokens:,} tokens: together "
            f"more than the context of {max_model_len:,}; ask for at most "
            f"{max_model_len - num_tokens:,}",
            max_tokens_name,
            "context_length_exceeded",
        )


def texts_in(value: Any) -> Iterable[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in cast(Mapping[str, Any], value).values():
            yield from texts_in(inner)
    elif isinstance(value, Sequence):
        for inner in cast(Sequence[Any], value):
            yield from texts_in(inner)


def _too_long(found: str, max_model_len: int, where: str) -> APIError:
    return invalid_request(
        f"{found}, and the context of this model is {max_model_len:,} tokens, prompt and answer "
        f"together; shorten it",
        where,
        "context_length_exceeded",
    )
