"""Prompts: a conversation or a text as token ids. One that does not fit the context is refused."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.output_processor import Prompt
from nemotron3.inference.requests import SamplingParams
from nemotron3.server.generation.token_ids import TokenPrefix
from nemotron3.server.http.errors import APIError, client_names, invalid_request
from nemotron3.text import Tool

_MAX_BYTES_PER_TOKEN = 256
"""Upper bound of a token's bytes, except for runs of spaces and punctuation."""


@dataclass(frozen=True, kw_only=True)
class ChatPlan:
    """A request for a conversation, at any endpoint: messages, tools, and sampling parameters."""

    messages: Sequence[Any]
    options: Mapping[str, Any]
    """Keyword arguments of `AsyncLLM.prepare_chat`."""
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    prefix: TokenPrefix | None = None
    """The ids of the first messages, where earlier turns came back with theirs."""
    is_single_call: bool = False
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """The request's names of fields that have other names in the package, for errors."""


async def prepare_chat(llm: AsyncLLM, plan: ChatPlan) -> Prompt:
    """Render and tokenize a conversation; raises APIError if it does not fit the context.

    A long one takes long, so this runs in a thread and not on the event loop.
    """
    where = plan.names.get("messages", "messages")
    if not plan.messages:
        raise invalid_request(f"{where} is empty; say something", where)
    options, prefix = plan.options, plan.prefix
    if prefix is not None:
        # A prompt that cannot fit is refused here: its ids would be copied for nothing.
        assert_fits(len(prefix.ids), None, llm.max_model_len, where, where)
        options = {
            **options,
            "prefix_ids": prefix.ids,
            "num_prefix_messages": prefix.num_messages,
        }
    prompt = await render_chat(
        llm, plan.messages, tools=plan.tools or None, options=options, names=plan.names
    )
    limit = plan.names.get("max_tokens", "max_tokens")
    assert_fits(len(prompt.ids), plan.params.max_tokens, llm.max_model_len, where, limit)
    return prompt


async def render_chat(
    llm: AsyncLLM,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None,
    options: Mapping[str, Any],
    names: Mapping[str, str],
) -> Prompt:
    """Render and tokenize a conversation; its tokens may be more than the context."""
    assert_not_hopeless(texts_in(messages), llm.max_model_len, names.get("messages", "messages"))
    with client_names(names):
        return await asyncio.to_thread(llm.prepare_chat, messages, tools=tools, **options)


async def prepare_text(llm: AsyncLLM, text: str) -> Prompt:
    """Tokenize a text in a thread."""
    assert_not_hopeless([text], llm.max_model_len, "prompt")
    return await asyncio.to_thread(llm.prepare_text, text)


def assert_not_hopeless(texts: Iterable[str], max_model_len: int, where: str) -> None:
    """Refuse texts that are too long for any tokenization, without tokenizing them."""
    characters = sum(len(text) for text in texts)
    if characters > _MAX_BYTES_PER_TOKEN * max_model_len:
        raise _too_long(f"{where} has {characters:,} characters", max_model_len, where)


def assert_fits(
    num_tokens: int, max_tokens: int | None, max_model_len: int, where: str, limit: str
) -> None:
    """Refuse a prompt that fills the context, and a limit of the answer that exceeds it."""
    if num_tokens == 0:
        raise invalid_request(f"{where} has no tokens; give at least one", where)
    if num_tokens >= max_model_len:
        raise _too_long(f"{where} has {num_tokens:,} tokens", max_model_len, where)
    if max_tokens is not None and num_tokens + max_tokens > max_model_len:
        raise invalid_request(
            f"{limit} is {max_tokens:,} and {where} has {num_tokens:,} tokens: together "
            f"more than the context length of {max_model_len:,}; ask for at most "
            f"{max_model_len - num_tokens:,}",
            limit,
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
        f"{found}, and the context length of this model is {max_model_len:,} tokens, prompt and "
        f"answer together; shorten it",
        where,
        "context_length_exceeded",
    )
