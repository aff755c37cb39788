"""From a conversation or a text to token ids; what does not fit the context is refused here."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.output_processor import Prompt
from nemotron3.inference.requests import SamplingParams
from nemotron3.server.http.errors import APIError, invalid_request, rename_params
from nemotron3.text import Tool

_MAX_BYTES_PER_TOKEN = 256
"""No entry of a vocabulary stands for more text, but for runs of blanks and signs."""


@dataclass(frozen=True, kw_only=True)
class ChatPlan:
    """Messages and tools for the template, parameters for the engine."""

    messages: Sequence[Any]
    options: Mapping[str, Any]
    """Keyword arguments of `prepare_chat`."""
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    is_single_call: bool = False
    source: str = "messages"
    """The field that holds the conversation, for errors."""
    max_tokens_name: str = "max_completion_tokens"
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the request calls the options of `prepare_chat`, where that is something else."""


async def prepare_chat(llm: AsyncLLM, plan: ChatPlan) -> Prompt:
    """Render a conversation and cut it into tokens; raises where it does not fit.

    A long one takes its time, so this happens in a thread and not on the event loop.
    """
    limit = llm.max_model_len
    if not plan.messages:
        raise invalid_request(f"{plan.source} is empty; say something", plan.source)
    assert_not_hopeless(texts_in(plan.messages), limit, plan.source)
    with rename_params(plan.names):
        prompt = await asyncio.to_thread(
            llm.prepare_chat, plan.messages, tools=plan.tools or None, **plan.options
        )
    most = plan.params.max_tokens
    assert_fits(len(prompt.ids), most, limit, plan.source, plan.max_tokens_name)
    return prompt


async def prepare_text(llm: AsyncLLM, text: str) -> Prompt:
    """Cut a text into tokens, in a thread."""
    assert_not_hopeless([text], llm.max_model_len, "prompt")
    return await asyncio.to_thread(llm.prepare_text, text)


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
