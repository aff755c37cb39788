"""The bodies of /v1/completions, /tokenize and /detokenize: texts and token ids as they stand."""

from collections.abc import Mapping
from typing import Any, ClassVar

from nemotron3.server.bodies import (
    Body,
    ChatTemplateKwargs,
    SamplingBody,
    StreamOptions,
    Unsupported,
)


class CompletionBody(SamplingBody):
    """Texts, or lists of token ids, to go on with."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **SamplingBody.unsupported,
        "suffix": Unsupported("the model writes from left to right", ("",)),
        "prompt_embeds": Unsupported("give a text or token ids"),
        "response_format": Unsupported("write `structured_outputs`"),
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    n: int | None = None
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None


class TokenizeBody(Body):
    """A text, or a conversation as the chat template writes it, to cut into tokens."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "add_special_tokens": Unsupported("a text is taken as it stands", (False,)),
    }

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids to put together again."""

    model: str | None = None
    tokens: list[int]
